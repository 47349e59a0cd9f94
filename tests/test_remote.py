"""Test cells over HTTP: one row per answer, none lost, duplicated or wrong, for all faults of the endpoint."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import polars as pl
import pyarrow.parquet as pq
import pytest
import tenacity
from misbehaving import MODEL, answer_to, serving

from kv_transition import settings as settings_module
from kv_transition import specs
from kv_transition.engines import device_memory, openai_compat
from kv_transition.errors import UserError
from kv_transition.eval.failures import failure
from kv_transition.provenance import digest, imported_modules, read_metadata, rows_to_table, write_table
from kv_transition.run.command import answer_seed
from kv_transition.studies.grid import remote
from kv_transition.studies.grid import specs as grid_specs
from kv_transition.tables import BIN

SOURCE = Path(remote.__file__).parents[2]
KEY = "sk-planted-8e1b5c0f2a"
TIMES = ["ttft_s", "decode_s", "latency_s", "raw", "co_running", "batch_size"]

SPEC = {
    "mode": "after_prompt",
    "policy": "mine",
    "kind": "snapkv",
    "hyper_parameters": {"window": 16},
    "budget": "r0.5",
    "first_token": "compressed",
    "decoding": {"temperature": 0.0, "repeats": 1, "seed": 0},
    "endpoint": {
        "base_url": None, "model": MODEL, "extra_body": {"cache": "half"}, "api": "completions", "send": "auto",
        "serves": None, "timeout_s": 20.0, "stream": True,
    },
    "code": "c",
    "policy_content": None,
}  # fmt: skip


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    monkeypatch.setattr(openai_compat, "BACKOFF", tenacity.wait_none())


def example(number: int, mark: str = "") -> dict:
    return {
        "task": "t", "example_id": f"e{number}", "question": "q", "answers": ["a"], "all_classes": None, "meta": "{}",
        "token_len": 100, "prompt_len": 10, "bin": 0, "prompt_sha256": f"sha{number}", "max_new_tokens": 9,
        "context_text": f"<user>no {number} {mark}", "question_text": " is?<answer>", "content_start": 6,
        "content_end": 4, "context_ids": [1, 2, 3], "question_ids": [4, number],
    }  # fmt: skip


def prompt_of(row: dict) -> str:
    return row["context_text"] + row["question_text"]


class Cell:
    """The files of one cell and the command that creates it."""

    def __init__(self, folder: Path, examples: list[dict], url: str, **endpoint):
        self.bin, self.output, self.examples = folder / "bin0.parquet", folder / "cell" / "bin0.parquet", examples
        write_table(self.bin, rows_to_table(examples, BIN), {"dataset": "d", "split": "test", "max_length": "99"})
        self.spec = SPEC | {"endpoint": SPEC["endpoint"] | {"base_url": url} | endpoint}
        self.journal = self.output.with_name(".bin0.parquet.journal")

    @property
    def arguments(self) -> list[str]:
        return ["--spec", json.dumps(self.spec), "--bin", str(self.bin), "--output", str(self.output)]

    def run(self) -> list[dict]:
        remote.main([*self.arguments, "--calibration", "--treated"])
        return self.rows()

    def start(self, requests: str = "2:2:1:PLANTED_KEY") -> subprocess.Popen:
        environment = os.environ | {"PYTHONPATH": str(SOURCE), "KVT_REQUESTS": requests}
        command = [sys.executable, "-m", "kv_transition.studies.grid.remote", *self.arguments]
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def rows(self) -> list[dict]:
        return pq.read_table(self.output).to_pylist()


@pytest.fixture
def cell(tmp_path, monkeypatch):
    monkeypatch.setenv("KVT_REQUESTS", "2:1:1:")
    with serving() as server:

        def make(*marks: str, **endpoint) -> Cell:
            made = Cell(tmp_path, [example(i, mark) for i, mark in enumerate(marks)], server.url, **endpoint)
            made.server = server
            return made

        yield make


def test_every_example_is_a_row_of_the_table(cell):
    job = cell("", "", "")
    rows = job.run()
    assert [row["example_id"] for row in rows] == ["e0", "e1", "e2"]
    row = rows[1]
    assert row["text"] == answer_to("no 1")
    assert (row["policy"], row["budget"], row["mode"], row["bin"], row["repeat"]) == (
        "mine",
        "r0.5",
        "after_prompt",
        0,
        0,
    )
    assert (row["engine"], row["base_url"]) == ("openai", job.server.url)
    assert (row["prompt_tokens"], row["completion_tokens"], row["finish_reason"]) == (10, 9, "stop")
    assert row["cell_hash"] == digest(job.spec)
    assert row["ttft_s"] + row["decode_s"] <= row["latency_s"]
    assert (row["batch_size"], row["co_running"]) == (1, False)
    assert all(row[name] is None for name in ("kept_final", "cache_bytes", "full_bytes", "prefill_s", "error"))
    assert json.loads(row["raw"])["http"]["concerns"] == []
    assert job.server.asked[prompt_of(job.examples[1])] == 1
    assert {json.dumps(body.get("cache")) for body in job.server.bodies} == {'"half"'}
    assert not job.journal.exists()
    facts = read_metadata(job.output)
    assert json.loads(facts["endpoint_declared"])["base_url"] == job.server.url
    assert (facts["kind"], facts["dataset"], facts["device"]) == ("snapkv", "d", "endpoint")


# Each fault of the server, its number of repeats, the label of the row, and the number of requests for the row.
FAULTS = [
    *((f"{fault}*2", None, 3) for fault in ("reset", "error500", "not_json", "error200", "error_in_stream")),
    ("reset", "ENGINE_ERROR", 4),  # one more request, because the server can be reached again
    *((fault, "ENGINE_ERROR", 3) for fault in ("error500", "not_json", "error200", "html", "shape")),
    *((fault, "ENGINE_ERROR", 3) for fault in ("error_in_stream", "no_choices", "unfinished", "error503", "cut")),
    *((fault, "ENGINE_ERROR", 1) for fault in ("too_long", "refused_in_stream")),
    ("oom", "OOM", 1),
    *((fault, "TIMEOUT", 1) for fault in ("hang", "trickle", "endless")),
    *((fault, None, 1) for fault in ("bytewise", "whole_instead", "usage_wrong", "usage_none")),
    ("rate*1", None, 2),
]  # fmt: skip


@pytest.mark.parametrize("requests", ["2:1:1:", "2:4:1:"], ids=["one by one", "four at a time"])
def test_faults_of_a_server_and_what_becomes_of_the_rows(cell, monkeypatch, requests):
    """Check the table of docs/endpoints.md. Faulty prompts alternate with good ones, which must not be affected."""
    monkeypatch.setenv("KVT_REQUESTS", requests)
    marks = [mark for fault, _, _ in FAULTS for mark in (f"[[{fault}]]", "")]
    job = cell(*marks, timeout_s=1.5)
    job.server.cut_at = 500
    rows = job.run()
    assert [row["example_id"] for row in rows] == [f"e{i}" for i in range(len(marks))]
    for number, (row, mark) in enumerate(zip(rows, marks, strict=True)):
        asked = job.server.asked[prompt_of(job.examples[number])]
        _, label, requests_made = FAULTS[number // 2] if mark else (None, None, 1)
        assert asked == requests_made, mark
        if label is None:
            assert (row["text"], row["error"]) == (answer_to(f"no {number}"), None), mark
        else:
            assert row["text"] is None, mark
            assert failure("", ["a"], error=row["error"], finish_reason=row["finish_reason"]) == label, mark
            assert row["error"].startswith(f"{label}: "), mark


def test_the_documentation_lists_every_fault_that_is_tested():
    page = (Path(__file__).parents[1] / "docs" / "endpoints.md").read_text(encoding="utf-8")
    table = page.split("## Faults and outcomes")[1].split("\n## ")[0]
    for fault in {fault.partition("*")[0] for fault, _, _ in FAULTS} | {"rate_long"}:
        assert f"`{fault}`" in table, fault


@pytest.mark.parametrize(
    ("mark", "prompt_tokens", "completion_tokens", "concerns"),
    [
        ("[[usage_none]]", None, None, ["no usage"]),
        ("[[usage_wrong]]", None, None, ["prompt_tokens 0 cannot be right", "completion_tokens 10 cannot be right"]),
    ],
)
def test_usage_that_cannot_be_right_is_null_and_said(cell, mark, prompt_tokens, completion_tokens, concerns):
    (row,) = cell(mark).run()
    assert (row["prompt_tokens"], row["completion_tokens"]) == (prompt_tokens, completion_tokens)
    assert json.loads(row["raw"])["http"]["concerns"] == concerns


def test_another_number_of_prompt_tokens_is_a_concern(cell):
    job = cell("")
    job.examples[0]["prompt_len"] = 12
    write_table(job.bin, rows_to_table(job.examples, BIN), {})
    (row,) = job.run()
    assert row["prompt_tokens"] == 10
    assert json.loads(row["raw"])["http"]["concerns"] == ["prompt_tokens 10, and 12 by the tokenizer of model.name"]


def test_requests_that_overlap_say_nothing_of_costs(cell, monkeypatch):
    """Check that rows of overlapping requests are marked and have no batch size."""
    monkeypatch.setenv("KVT_REQUESTS", "2:4:1:")
    job = cell("", "", "", "")
    job.server.slow_s = 0.1
    assert {(row["co_running"], row["batch_size"]) for row in job.run()} == {(True, None)}


def test_without_a_limit_on_jobs_nobody_knows_what_else_runs(cell, monkeypatch):
    """Check that co_running is null if the number of parallel jobs is not limited."""
    monkeypatch.setenv("KVT_REQUESTS", "2:1:0:")
    assert {(row["co_running"], row["batch_size"]) for row in cell("", "").run()} == {(None, None)}


def test_an_empty_bin_asks_nobody(tmp_path):
    job = Cell(tmp_path, [], "http://127.0.0.1:1/v1")
    assert job.run() == []


def test_repeats_are_asked_for_each_with_a_seed_of_its_own(cell):
    job = cell("")
    job.spec["decoding"] = {"temperature": 1.0, "repeats": 3, "seed": 7}
    assert [row["repeat"] for row in job.run()] == [0, 1, 2]
    sent = [body["seed"] for body in job.server.bodies if body["max_tokens"] == 9]
    assert sorted(sent) == sorted(answer_seed(7, "e0", r) % 2**31 for r in range(3))


# ----------------------------------------------------------------------------------------------------
# Contents of the requests


def test_chat_gets_the_message_without_the_template_that_its_server_adds(cell):
    job = cell("", api="chat")
    (row,) = job.run()
    assert job.server.bodies[-1]["messages"] == [{"role": "user", "content": "no 0  is?"}]
    assert row["text"] == answer_to("no 0")


def test_a_template_that_cannot_be_taken_off_is_refused(cell):
    job = cell("", api="chat")
    job.examples[0] |= {"content_start": None, "content_end": None}
    write_table(job.bin, rows_to_table(job.examples, BIN), {})
    with pytest.raises(UserError, match=r"t, e0: .* set model.chat_template to never"):
        job.run()
    assert not job.server.bodies


def test_token_ids_are_sent_where_they_are_asked_for(cell):
    job = cell("", "", send="tokens")
    assert [row["text"] for row in job.run()] == [answer_to("no 0"), answer_to("no 1")]
    assert [1, 2, 3, 4, 1] in [body["prompt"] for body in job.server.bodies]


@pytest.mark.parametrize(
    ("budget", "sent"), [("r0.5", {"kv_budget": 0.5}), ("t128", {"kv_budget": {"tokens": 128}}), ("r1", {})]
)
@pytest.mark.parametrize(
    ("endpoint", "place"),
    [
        ({"api": "completions", "send": "auto"}, 3),
        ({"api": "completions", "send": "text"}, len("<user>no 4 ")),
        ({"api": "chat", "send": "auto"}, {"message": 0, "characters": len("no 4 ")}),
    ],
)
def test_a_server_of_kv_transition_is_told_policy_budget_mode_and_where_the_context_ends(budget, sent, endpoint, place):
    spec = SPEC | {"budget": budget, "endpoint": SPEC["endpoint"] | endpoint | {"serves": "kv_transition"}}
    request = remote.request_of(spec, example(4), 1)
    assert request.extra_body == {
        "cache": "half",
        "kv_policy": {"kind": "snapkv", "window": 16},
        "kv_mode": "after_prompt",
        "kv_context": place,
        "kv_seed": answer_seed(0, "e4", 1),
        "kv_first_token": "compressed",
        **sent,
    }
    assert (request.prompt == [1, 2, 3, 4, 4]) == (place == 3)


def test_an_endpoint_that_only_says_it_is_kv_transition_is_found_out(cell):
    """Check that an endpoint that is declared as kv_transition and does not confirm the policy is refused."""
    with pytest.raises(UserError, match="does not confirm that it served mine at"):
        cell("", serves="kv_transition").run()


# ----------------------------------------------------------------------------------------------------
# Stop and continue


def comparable(rows: list[dict]) -> list[dict]:
    return [{key: value for key, value in row.items() if key not in TIMES} for row in rows]


def test_a_killed_job_goes_on_with_the_rows_it_has_not_got(tmp_path):
    """Kill the job while two requests wait: answered requests are not sent again."""
    examples = [example(i, "[[gate*1]]" if i >= 5 else "") for i in range(9)]
    with serving() as server:
        job = Cell(tmp_path, examples, server.url)
        process = job.start()
        deadline = time.monotonic() + 60
        while not (job.journal.exists() and job.journal.read_bytes().count(b"\n") == 5 and server.under_way == 2):
            assert process.poll() is None, process.stdout.read()
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not job.output.exists()
        with job.journal.open("ab") as file:
            file.write(b'{"example_id": "e7", "text": "half a l')  # an incomplete line, as after a crash of the machine

        before = server.asked.copy()
        server.gate.set()
        process = job.start()
        assert process.wait(60) == 0, process.stdout.read()
        sent = server.asked - before
        preflight = "Hello, world"
        assert sent == {preflight: 1} | {prompt_of(e): 1 for e in examples[5:]}
        assert {server.asked[prompt_of(e)] for e in examples[:5]} == {1}

        undisturbed = Cell(tmp_path / "undisturbed", examples, server.url)
        process = undisturbed.start()
        assert process.wait(60) == 0
    assert comparable(job.rows()) == comparable(undisturbed.rows())
    assert [row["text"] for row in job.rows()] == [answer_to(f"no {i}") for i in range(9)]
    assert not job.journal.exists()


def test_an_endpoint_that_stops_answering_costs_no_row(cell, monkeypatch):
    job = cell("", "", "[[rate_long*1]]", "")
    with pytest.raises(UserError, match="allows no more requests for now"):
        job.run()
    assert not job.output.exists()
    assert len(job.journal.read_bytes().splitlines()) == 2
    assert [row["text"] for row in job.run()] == [answer_to(f"no {i}") for i in range(4)]
    assert [job.server.asked[prompt_of(e)] for e in job.examples] == [1, 1, 2, 1]


def test_an_endpoint_that_dies_costs_no_row(cell):
    job = cell("", "", "[[die*1]]", "")
    with pytest.raises(UserError, match=r"cannot be reached: .*is the server running there\?"):
        job.run()
    assert not job.output.exists()
    with serving(port=job.server.server_address[1]) as again:
        again.asked[prompt_of(job.examples[2])] = 1  # the first server ended at this request
        assert [row["text"] for row in job.run()] == [answer_to(f"no {i}") for i in range(4)]
        assert [again.asked[prompt_of(e)] for e in job.examples] == [0, 0, 2, 1]


def test_a_complete_journal_asks_nobody(cell):
    """Check a job killed between the last row and the output file."""
    job = cell("", "")
    rows = job.run()
    with remote.journal_of(str(job.output)) as journal:
        for row in rows:
            journal.add(row)
        asked = job.server.asked.copy()
        again = remote.rows(job.examples, job.spec, openai_compat.Client("http://127.0.0.1:1/v1"), journal)
    assert again == rows
    assert job.server.asked == asked


@pytest.mark.parametrize("other", [{"cell_hash": "another"}, {"prompt_sha256": "another"}])
def test_rows_of_other_settings_or_prompts_are_not_taken_over(cell, other):
    job = cell("", "")
    rows = job.run()
    job.journal.write_text("".join(json.dumps(row | other | {"text": "old"}) + "\n" for row in rows))
    assert comparable(job.run()) == comparable(rows)


def test_two_jobs_do_not_answer_one_cell(cell):
    job = cell("")
    with remote.journal_of(str(job.output)), pytest.raises(UserError, match="another job is answering this cell"):
        job.run()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"base_url": "http://127.0.0.1:1/v1"}, "cannot be reached"),
        ({"model": "other"}, "has no model 'other'"),
        ({"extra_body": {"model": "x"}}, "has no model"),
    ],
)
def test_what_no_row_can_survive_stops_the_job_before_the_first(cell, change, sentence):
    """Check that an error that affects every row stops the job before the first row."""
    job = cell("", "", "", **change)
    with pytest.raises(UserError, match=sentence):
        job.run()
    assert not job.output.exists()
    assert not job.journal.exists()
    assert len(job.server.bodies) <= 1


# ----------------------------------------------------------------------------------------------------
# The API key


@pytest.mark.parametrize("known", [True, False])
def test_the_key_is_in_no_file_and_no_log(tmp_path, monkeypatch, known):
    monkeypatch.setenv("PLANTED_KEY", KEY)
    with serving(key=KEY if known else "sk-the-right-one") as server:
        examples = [
            example(i, mark) for i, mark in enumerate(["", "[[echo500]]", "[[parrot]]", "[[hang]]", "[[reset]]"])
        ]
        job = Cell(tmp_path, examples, server.url, timeout_s=2.0)
        process = job.start("1:2:1:PLANTED_KEY")
        log = process.communicate(timeout=60)[0]
        assert set(server.authorizations) == {f"Bearer {KEY}"}
    (tmp_path / "log").write_text(log)
    if known:
        assert [bool(row["error"]) for row in job.rows()] == [False, True, True, True, True]
        assert "Bearer ***" in job.rows()[1]["error"]
    else:
        assert process.returncode == 2
        assert len(log.strip().splitlines()) == 1, log
        assert "does not accept the one in the environment variable PLANTED_KEY" in log
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) >= 2
    for path in files:
        assert KEY.encode() not in path.read_bytes(), path
        if path.suffix == ".parquet":  # a Parquet file is compressed, so its rows are searched too
            assert KEY not in str(pq.read_table(path).to_pylist()), path
            assert KEY not in str(read_metadata(path)), path


# ----------------------------------------------------------------------------------------------------
# Settings of the experiment's endpoints


def experiment(engine: dict, **changes) -> settings_module.Settings:
    config = {
        "dataset": {"name": "synthetic", "tasks": ["reader_qa"], "lengths": [128], "n_per_length": 3},
        "kv": {"modes": ["after_prompt"], "policies": {"full": {}, "h2o": {}}, "budgets": [1.0, 0.5, 0.2]},
        "engine": {"kind": "openai", "base_url": "http://127.0.0.1:8000/v1"} | engine,
    }
    return settings_module.parse(config | changes)


MAPPED = {"h2o@r0.5": {"model": "half"}, "h2o@r0.2": {"base_url": "http://127.0.0.1:8001/v1", "extra_body": {"b": 1}}}


def test_every_policy_and_budget_has_what_stands_for_it():
    """Check that each policy and budget is sent to its declared endpoint, model and extra body."""
    settings = experiment({"endpoints": MAPPED, "model": "m", "extra_body": {"a": 0, "b": 0}})
    specs.check(settings)
    told = {cell[1:]: grid_specs.cell(settings, *cell)["endpoint"] for cell in grid_specs.cells(settings)}
    keys = ("base_url", "model", "extra_body")
    assert {cell: tuple(e[key] for key in keys) for cell, e in told.items()} == {
        ("full", "r1"): ("http://127.0.0.1:8000/v1", "m", {"a": 0, "b": 0}),
        ("h2o", "r0.5"): ("http://127.0.0.1:8000/v1", "half", {"a": 0, "b": 0}),
        ("h2o", "r0.2"): ("http://127.0.0.1:8001/v1", "m", {"a": 0, "b": 1}),
    }
    assert specs.statistics(settings) == []


@pytest.mark.parametrize(
    ("engine", "changes", "sentence"),
    [
        ({}, {}, "engine.endpoints: no server is given for h2o at r0.5; add 'h2o@r0.5'"),
        ({"endpoints": {"h2o@r0.5": {"model": "half"}}}, {}, "no server is given for h2o at r0.2"),
        ({"endpoints": {"h2o": {"model": "x"}}}, {}, "h2o at r0.5 and h2o at r0.2 have the same server"),
        ({"endpoints": {"h2o": {}}}, {}, "full at r1 and h2o at r0.5 have the same server"),
        ({"endpoints": MAPPED | {"tova": {"model": "x"}}}, {}, "engine.endpoints.tova: the experiment has no such"),
        ({"endpoints": MAPPED, "serves": "kv_transition"}, {}, "receives the policy with each request"),
        ({"endpoints": MAPPED}, {"observe": {"enabled": True}}, "observe.enabled: this needs the model itself"),
        (
            {"endpoints": MAPPED},
            {"kv": {"policies": {"full": {}}, "budgets": [1.0]}},
            "kv.modes: an endpoint gets the whole prompt at once",
        ),
        (
            {"serves": "kv_transition"},
            {"kv": {"policies": {"full": {}, "r": {"kind": "entropy_recall", "tau_quantile": 0.9}}, "budgets": [0.5]}},
            "kv.policies.r: it cannot be calibrated on an endpoint",
        ),
    ],
)
def test_a_declaration_that_does_not_hold_together_is_one_sentence(engine, changes, sentence):
    with pytest.raises(UserError, match=sentence.replace("(", r"\(")):
        specs.check(experiment(engine, **changes))


def test_policies_that_only_the_endpoint_knows_are_taken_by_name():
    kv = {"modes": ["after_prompt"], "policies": {"full": {}, "fp8": {"bits": 8}}, "budgets": [1.0, 0.5]}
    settings = experiment({"endpoints": {"fp8": {"model": "x"}}}, kv=kv)
    specs.check(settings)
    assert grid_specs.cell(settings, "after_prompt", "fp8", "r0.5")["hyper_parameters"] == {"bits": 8}
    with pytest.raises(UserError, match="there is no policy 'fp8'"):
        specs.check(experiment({"serves": "kv_transition"}, kv=kv))


def test_the_hash_of_a_cell_knows_its_endpoint_and_not_how_it_is_asked():
    def hashed(engine: dict, **changes) -> str:
        return digest(
            grid_specs.cell(experiment({"endpoints": MAPPED} | engine, **changes), "after_prompt", "h2o", "r0.5")
        )

    first = hashed({})
    assert first == hashed({"api_key_env": None, "request": {"retries": 0, "concurrency": 9}})
    assert first == hashed({}, model={"dtype": "bfloat16"})  # dtype describes local weights; the endpoint has its own
    assert first != hashed({"base_url": "http://127.0.0.1:9000/v1"})
    assert first != hashed({"extra_body": {"a": 1}})
    assert first != hashed({"request": {"timeout_s": 5.0}})
    covered = imported_modules("kv_transition.studies.grid.remote")
    assert "kv_transition.engines.openai_compat" in covered
    assert not covered & {"kv_transition.engines.local", "kv_transition.cache.state", "kv_transition.settings"}


@pytest.mark.parametrize("url", ["http://me:secret@host/v1", "https://host/v1?api-key=secret"])
def test_a_key_in_an_address_is_refused_without_being_repeated(url):
    with pytest.raises(UserError, match="it contains a key or a password") as error:
        experiment({"base_url": url})
    assert "secret" not in str(error.value)


def test_a_key_in_place_of_its_variables_name_is_refused_without_being_repeated():
    with pytest.raises(UserError, match="never the key itself") as error:
        experiment({"api_key_env": KEY})
    assert KEY not in str(error.value)


# ----------------------------------------------------------------------------------------------------
# GPU memory of the machine


def fake_nvml(used: list[int]) -> SimpleNamespace:
    """Return a fake NVML with two GPUs; the memory used on the first one follows a list, in MiB."""
    first = iter(used)

    def info(handle: int) -> SimpleNamespace:
        return SimpleNamespace(used=(next(first, 10) if handle == 0 else 5) * 2**20)

    return SimpleNamespace(
        nvmlInit=lambda: None,
        nvmlShutdown=lambda: None,
        nvmlDeviceGetCount=lambda: 2,
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetMemoryInfo=info,
    )


def test_the_peak_is_that_of_the_time_between(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml([10, 300, 20]))
    monkeypatch.setattr(device_memory, "PERIOD_S", 0.01)
    begin = time.perf_counter()
    with device_memory.Watch() as watch:
        while len(watch._samples) < 5:
            time.sleep(0.01)
    end = time.perf_counter()
    assert watch.peak_mb(begin, end) == 305
    assert watch.peak_mb(watch._samples[2][0], end) == 25
    assert watch.peak_mb(end + 1, end + 2) is None


def test_a_machine_without_nvml_measures_nothing(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with device_memory.Watch() as watch:
        assert watch.peak_mb(0, time.perf_counter()) is None


# ----------------------------------------------------------------------------------------------------
# The whole workflow


@pytest.mark.slow
def test_an_experiment_over_http_reaches_its_report(tmp_path, monkeypatch):
    from project import SMALL, Project

    monkeypatch.setenv("PLANTED_KEY", KEY)
    project = Project(tmp_path)
    with serving(key=KEY) as server:
        engine = {
            "kind": "openai", "base_url": server.url, "model": MODEL, "api_key_env": "PLANTED_KEY",
            "endpoints": {"h2o@r0.5": {"extra_body": {"cache": "half"}}},
        }  # fmt: skip
        kv = {"modes": ["after_prompt"], "policies": {"full": {}, "h2o": {}}, "budgets": [1.0, 0.5]}
        project.configure(SMALL | {"engine": engine, "kv": kv})
        project.run("--resources", "endpoint=1")
        assert project.planned()["cell"] == 0
        sent = [body for body in server.bodies if body["max_tokens"] > 1]
        assert len(sent) == 2 * 2 * 3
    assert not (project.folder / "results" / "prefill").exists()
    scores = pl.read_parquet(project.results / "scores.parquet")
    assert set(scores["engine"]) == {"openai"}
    report = (project.results / "report.md").read_text(encoding="utf-8")
    assert server.url in report
    assert "declared" in report
    assert "not verified" in report
    for path in [path for path in project.folder.rglob("*") if path.is_file()]:
        assert KEY.encode() not in path.read_bytes(), path


def test_the_report_says_what_was_declared_and_what_does_not_fit():
    from kv_transition.studies.grid.report import endpoints

    told = experiment({"endpoints": MAPPED, "model": "m", "extra_body": {"a": 0}}).model_dump(mode="json")
    assert endpoints.setup(told) == [
        ("Endpoint", 'http://127.0.0.1:8000/v1, model m, {"a": 0}, completions; declared: the full cache'),
        ("Declared for policies", 'h2o@r0.5: model half; h2o@r0.2: http://127.0.0.1:8001/v1, {"b": 1}'),
    ]
    assert endpoints.setup({"engine": {"kind": "local"}}) == []
    concerns = [[], ["no usage"], ["prompt_tokens 10, and 12 by the tokenizer of model.name"], []]
    rows = [
        {"base_url": "http://h/v1", "policy": "h2o", "kept_mean": None, "raw": json.dumps({"http": {"concerns": c}})}
        for c in concerns
    ]
    found = endpoints.limits(told, pl.DataFrame(rows, schema_overrides={"kept_mean": pl.Float64}))
    assert "not verified" in found[0]
    assert "It is not known whether an endpoint compresses at all" in found[1]
    assert found[2].startswith("For 1 of 4 answers the endpoint counted another number of prompt tokens")
    assert found[3] == "For 1 of 4 answers the endpoint's token counts were missing or impossible."
    served = [row | {"kept_mean": 5.0, "raw": None} for row in rows]
    found = endpoints.limits(
        {"engine": {"serves": "kv_transition"}}, pl.DataFrame(served, schema_overrides={"raw": pl.String})
    )
    assert len(found) == 1
    assert "values that the endpoint reports" in found[0]
    local = pl.DataFrame([row | {"base_url": None} for row in rows], schema_overrides={"base_url": pl.String})
    assert endpoints.limits({}, local) == []
