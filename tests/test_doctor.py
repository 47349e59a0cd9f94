"""Test the doctor: all its findings, and the conditions under which an experiment cannot run."""

from __future__ import annotations

import copy
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import yaml
from project import ROOT, SMALL
from typer.testing import CliRunner

from kv_transition import cli, doctor
from kv_transition import settings as settings_module
from kv_transition.plan.model_size import ModelSize

REVISION = "0" * 40
NOBODY = "http://127.0.0.1:9"


@pytest.fixture
def parsed(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    for variable in ("HF_HUB_OFFLINE", "HF_TOKEN"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HF_ENDPOINT", NOBODY)

    def settings(model: dict | None = None, **sections):
        config = copy.deepcopy(SMALL) | {"output": {"dir": str(tmp_path / "results")}} | sections
        config["model"] = config["model"] | (model or {})
        return settings_module.parse({key: value for key, value in config.items() if value is not None})

    return settings


@pytest.fixture
def server():
    """Yield a host that answers every path with the status that a test sets, and records the headers."""
    seen: list[tuple[str, str | None]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            seen.append((self.path, self.headers.get("Authorization")))
            self.send_response(running.status)
            self.end_headers()

        def log_message(self, *arguments):
            pass

    running = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    running.status, running.seen = 200, seen
    running.url = f"http://127.0.0.1:{running.server_port}"
    thread = threading.Thread(target=running.serve_forever)
    thread.start()
    yield running
    running.shutdown()
    running.server_close()
    thread.join()


def found(settings, what: str) -> doctor.Finding:
    return next(finding for finding in doctor.examine(settings) if finding.what == what)


def no_gpu(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def test_the_embedded_model_on_a_cpu_needs_nothing(parsed, monkeypatch):
    no_gpu(monkeypatch)
    states = {finding.what: finding.state for finding in doctor.examine(parsed())}
    lines = {"Python", "torch", "GPU", "memory", "flash-attn", "triton", "bitsandbytes", "accelerate"}
    lines |= {"model", "tokenizer", "data set", "conda", "Slurm", "disk"}
    assert set(states) == lines
    assert {states[what] for what in lines - {"conda", "Slurm"}} == {"ok"}


@pytest.mark.parametrize(("device", "state"), [("cpu", "ok"), ("auto", "warn"), ("cuda", "fail")])
def test_a_missing_gpu_matters_where_one_is_asked_for(device, state, parsed, monkeypatch):
    """Check that a missing GPU is an error for the device cuda, a warning for auto, and no problem for cpu."""
    no_gpu(monkeypatch)
    finding = found(parsed({"device": device}), "GPU")
    assert finding.state == state
    assert bool(finding.fix) == (state != "ok")


@pytest.mark.parametrize(
    ("model", "what", "module"),
    [
        ({"attn_implementation": "flash_attention_2"}, "flash-attn", "flash_attn"),
        ({"attention_statistics": "triton"}, "triton", "triton"),
        ({"quantization": {}}, "bitsandbytes", "bitsandbytes"),
        ({"device_map": "auto"}, "accelerate", "accelerate"),
    ],
)
def test_a_missing_extension_fails_only_where_it_is_asked_for(model, what, module, parsed, monkeypatch):
    """Check that a missing package is an error only if the configuration needs it."""
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None)
    assert found(parsed(), what).state == "ok"
    finding = found(parsed(model), what)
    assert finding.state == "fail"
    assert finding.fix


def huge(monkeypatch):
    size = ModelSize(80, 8192, 28672, 64, 8, 128, 128256, False)  # 70 billion parameters
    monkeypatch.setattr(doctor, "model_size", lambda model: size)


def test_a_model_that_fits_no_memory_is_a_failure(parsed, monkeypatch):
    huge(monkeypatch)
    monkeypatch.setattr(doctor.os, "sysconf", {"SC_PHYS_PAGES": 10**7, "SC_PAGE_SIZE": 4096}.get)  # 41 GB
    finding = found(parsed(), "memory")
    assert finding.state == "fail"
    assert "282 GB" in finding.found  # 70.6e9 parameters of 4 bytes each


def test_a_hub_that_cannot_be_reached_is_one_clear_line(parsed):
    finding = found(parsed({"name": "nobody/nothing", "revision": REVISION}), "model")
    assert finding.state == "fail"
    assert "the hub cannot be reached" in finding.found
    assert "give its folder" in finding.fix
    assert "make real" in finding.fix


@pytest.mark.parametrize(
    ("status", "state", "words"),
    [(200, "warn", "is on the hub"), (401, "fail", "refuses"), (403, "fail", "refuses"), (404, "fail", "has no")],
)
def test_what_the_hub_says_of_a_model(status, state, words, parsed, server, monkeypatch):
    server.status = status
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    finding = found(parsed({"name": "nobody/nothing", "revision": REVISION}), "model")
    assert finding.state == state
    assert words in finding.found
    assert server.seen[0][0] == f"/api/models/nobody/nothing/revision/{REVISION}"


def test_offline_is_offline(parsed, server, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert found(parsed({"name": "nobody/nothing"}), "model").state == "fail"
    assert server.seen == []


def test_a_model_folder_without_weights_or_tokenizer(parsed, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    settings = parsed({"name": str(tmp_path)})
    assert found(settings, "model").state == "fail"
    assert found(settings, "tokenizer").state == "fail"


def test_a_data_set_of_the_hub_is_asked_for(parsed, server, monkeypatch):
    longbench = {"name": "longbench", "tasks": ["hotpotqa"], "revision": REVISION, "path": "someone/LongBench"}
    assert found(parsed(dataset=longbench), "data set").state == "fail"
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    assert found(parsed(dataset=longbench), "data set").state == "warn"
    assert server.seen[0][0].startswith("/api/datasets/someone/LongBench")


@pytest.mark.parametrize(
    ("free", "store", "state"),
    [
        (1_000, "auto", "fail"),
        (200_000, "auto", "warn"),
        (200_000, "always", "warn"),
        (9 * 10**9, "auto", "warn"),  # auto leaves 10 GB of a large disk free
        (9 * 10**9, "always", "ok"),
        (9 * 10**9, "never", "ok"),
        (140_000, "never", "warn"),
        (10**12, "auto", "ok"),
    ],
)
def test_disk_is_held_against_the_estimate(free, store, state, parsed, monkeypatch):
    # eight cells and two indices take about 130 kB, six prefills of 128 or 256 tokens about 2 MB
    usage = type(shutil.disk_usage("/"))(total=10**13, used=10**13 - free, free=free)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    assert found(parsed(prefill={"store": store}), "disk").state == state


def test_an_endpoint_takes_the_place_of_model_and_gpu_and_its_key_is_never_shown(parsed, server, monkeypatch):
    engine = {"kind": "openai", "base_url": f"{server.url}/v1", "api_key_env": "SOME_KEY", "serves": "kv_transition"}
    monkeypatch.setenv("SOME_KEY", "planted-secret")
    findings = list(doctor.examine(parsed(engine=engine)))
    assert not {"GPU", "torch", "model"} & {finding.what for finding in findings}
    assert found(parsed(engine=engine), "endpoint").state == "ok"
    assert server.seen[0] == ("/v1/models", "Bearer planted-secret")
    assert "planted-secret" not in str(findings)
    server.status = 401
    assert found(parsed(engine=engine), "endpoint").state == "fail"
    monkeypatch.delenv("SOME_KEY")
    assert found(parsed(engine=engine), "key").state == "warn"
    gone = found(parsed(engine=engine | {"base_url": f"{NOBODY}/v1"}), "endpoint")
    assert gone.state == "fail"
    assert "cannot be reached" in gone.found


def test_status_1_says_that_the_experiment_cannot_be_run_here(parsed, tmp_path, monkeypatch):
    no_gpu(monkeypatch)
    path = tmp_path / "experiment.yaml"

    def status(device: str) -> int:
        path.write_text(yaml.safe_dump(SMALL | {"model": SMALL["model"] | {"device": device}}))
        done = CliRunner().invoke(cli.app, ["doctor", "-c", str(path)])
        assert "experiment small" in done.output
        return done.exit_code

    assert [status(device) for device in ("cpu", "auto", "cuda")] == [0, 0, 1]
