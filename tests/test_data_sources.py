"""Test the loaders: every source gives the same schema; an error names file and line, and no file is written."""

from __future__ import annotations

import gzip
import json
import zipfile
from hashlib import sha256

import httpx
import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_helpers import example, write_jsonl

from kv_transition import provenance, tables
from kv_transition.data import download as job
from kv_transition.data.records import local_source
from kv_transition.data.templates import official
from kv_transition.errors import UserError

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def run(tmp_path, dataset, task):
    """Download a source and read the result."""
    output = tmp_path / "out" / "source.parquet"
    job.download({"dataset": {"revision": None, "split": "test", **dataset}, "code": "x"}, task, str(output))
    return pq.read_table(output).to_pylist()


def own(path, **fields):
    return {"name": "jsonl", "path": str(path), **fields}


def longbench_record(i, **fields):
    return {
        "input": f"question {i}?",
        "context": f"context {i}",
        "answers": ["a", "b"],
        "length": 7,
        "dataset": "hotpotqa",
        "language": "en",
        "all_classes": None,
        "_id": f"id{i}",
        **fields,
    }


class TestOwnData:
    @pytest.mark.parametrize("name", ["mine.jsonl", "mine.jsonl.gz"])
    @pytest.mark.parametrize("as_folder", [True, False])
    def test_a_file_or_a_folder_plain_or_gzipped(self, tmp_path, name, as_folder):
        path = write_jsonl(tmp_path / "d" / name, [example(0, meta={"kind": "x"}), "", example(1), example(2, id=7)])
        rows = run(tmp_path, own(path.parent if as_folder else path), "mine")
        assert [row["example_id"] for row in rows] == ["e0", "e1", "7"]
        assert rows[0] == {
            "task": "mine",
            "example_id": "e0",
            "question": "w0 w0 ?",
            "context": example(0)["context"],
            "answers": ["w1"],
            "all_classes": None,
            "meta": '{"kind": "x"}',
        }
        assert rows[1]["meta"] == "{}"

    def test_schema_and_metadata(self, tmp_path):
        path = write_jsonl(tmp_path / "mine.jsonl", [example(0)])
        run(tmp_path, own(path), "mine")
        output = tmp_path / "out" / "source.parquet"
        assert pq.read_schema(output).remove_metadata() == tables.SOURCE
        meta = provenance.read_metadata(output)
        assert meta["dataset"] == "jsonl"
        assert meta["source_sha256"] == sha256(path.read_bytes()).hexdigest()
        assert {"revision", "split", "config_hash", "git_commit", "timestamp"} <= set(meta)

    def test_examples_without_id_are_named_after_their_content(self, tmp_path):
        records = [{k: v for k, v in example(i).items() if k != "id"} for i in range(3)]
        there = run(tmp_path, own(write_jsonl(tmp_path / "a.jsonl", records)), "mine")
        back = run(tmp_path, own(write_jsonl(tmp_path / "b.jsonl", records[::-1])), "mine")
        assert {r["context"]: r["example_id"] for r in there} == {r["context"]: r["example_id"] for r in back}
        assert len({r["example_id"] for r in there}) == 3

    def test_unusual_characters_survive(self, tmp_path):
        text = "a\u2028b\x85c\r\nd\ufeffe \U0001f600\t\x00"
        rows = run(tmp_path, own(write_jsonl(tmp_path / "a.jsonl", [example(0, context=text)])), "mine")
        assert rows[0]["context"] == text

    def test_a_byte_order_mark_is_no_text(self, tmp_path):
        path = tmp_path / "a.jsonl"
        path.write_text(json.dumps(example(0)) + "\n", encoding="utf-8-sig")
        assert len(run(tmp_path, own(path), "mine")) == 1

    @pytest.mark.parametrize(
        ("record", "message"),
        [
            ('{"question": "q", "context": ', "malformed JSON"),
            ("[1, 2]", "JSON object"),
            ({"question": "q", "context": "c"}, "'answers' is missing"),
            ({"context": "c", "answers": ["a"]}, "'question' is missing"),
            ({"question": "q", "answers": ["a"]}, "'context' is missing"),
            (example(9, context=" \n "), "context is empty"),
            (example(9, question=""), "question is empty"),
            (example(9, context=5), "context must be a text, not int"),
            (example(9, question=None), "question must be a text"),
            (example(9, answers="w1"), "answers must be a list"),
            (example(9, answers=[]), "answers must be a list"),
            (example(9, answers=[1]), "answers must be a list"),
            (example(9, answers=[" "]), "not empty"),
            (example(9, id=1.5), "the field 'id' must be a text or a whole number"),
            (example(9, id=True), "the field 'id' must be a text or a whole number"),
            (example(9, meta=["x"]), "meta must be a JSON object"),
            (example(9, id="e0"), "'e0' is already used at"),
            (example(0, id="other"), "same question and context"),
            ('{"question": "\\ud800", "context": "c", "answers": ["a"]}', "surrogate"),
        ],
    )
    def test_a_bad_line_is_named_and_nothing_is_written(self, tmp_path, record, message):
        path = write_jsonl(tmp_path / "bad.jsonl", [example(0), example(1), record])
        with pytest.raises(UserError) as error:
            run(tmp_path, own(path), "mine")
        assert f"{path}, line 3: " in str(error.value)
        assert message in str(error.value)
        assert not (tmp_path / "out").exists()

    def test_the_first_of_two_duplicates_is_named(self, tmp_path):
        path = write_jsonl(tmp_path / "bad.jsonl", [example(0), example(1), example(1)])
        with pytest.raises(UserError, match=r"line 3: the id 'e1' is already used at .*line 2"):
            run(tmp_path, own(path), "mine")

    def test_bytes_that_are_not_utf8(self, tmp_path):
        path = tmp_path / "bad.jsonl"
        path.write_bytes(json.dumps(example(0)).encode() + b"\n\xff\xfe\n")
        with pytest.raises(UserError, match="line 2: byte 1 is not UTF-8"):
            run(tmp_path, own(path), "mine")

    def test_a_damaged_archive(self, tmp_path):
        path = tmp_path / "bad.jsonl.gz"
        path.write_bytes(gzip.compress(json.dumps(example(0)).encode() * 100)[:-20])
        with pytest.raises(UserError, match=r"bad\.jsonl\.gz cannot be read"):
            run(tmp_path, own(path), "mine")
        path.write_bytes(b"no archive")
        with pytest.raises(UserError, match=r"bad\.jsonl\.gz cannot be read"):
            run(tmp_path, own(path), "mine")

    def test_files_that_are_not_there(self, tmp_path):
        write_jsonl(tmp_path / "d" / "other.jsonl", [example(0)])
        for path, message in [
            (tmp_path / "nowhere", "no file or folder"),
            (tmp_path / "d", r"no mine\.jsonl or mine\.jsonl\.gz; it contains other\.jsonl"),
            (write_jsonl(tmp_path / "mine.txt", [example(0)]), "must end in"),
            (write_jsonl(tmp_path / "empty.jsonl", [""]), "no examples"),
        ]:
            with pytest.raises(UserError, match=message):
                run(tmp_path, own(path), "mine")
        write_jsonl(tmp_path / "d" / "mine.jsonl", [example(0)])
        write_jsonl(tmp_path / "d" / "mine.jsonl.gz", [example(0)])
        with pytest.raises(UserError, match="contains both"):
            run(tmp_path, own(tmp_path / "d"), "mine")


class TestLongBench:
    def test_local_records_get_the_common_names(self, tmp_path):
        write_jsonl(tmp_path / "d" / "repobench-p.jsonl.gz", [longbench_record(0, dataset="repobench-p")])
        rows = run(tmp_path, {"name": "longbench", "path": str(tmp_path / "d")}, "repobench_p")
        assert rows == [
            {
                "task": "repobench_p",
                "example_id": "id0",
                "question": "question 0?",
                "context": "context 0",
                "answers": ["a", "b"],
                "all_classes": None,
                "meta": '{"dataset": "repobench-p", "language": "en", "length": 7}',
            }
        ]

    def test_tasks_without_a_question_may_leave_it_empty_and_others_not(self, tmp_path):
        dataset = {"name": "longbench", "path": str(tmp_path)}
        write_jsonl(tmp_path / "gov_report.jsonl", [longbench_record(0, input="", dataset="gov_report")])
        write_jsonl(tmp_path / "hotpotqa.jsonl", [longbench_record(0, input="")])
        assert run(tmp_path, dataset, "gov_report")[0]["question"] == ""
        with pytest.raises(UserError, match="line 1: question is empty"):
            run(tmp_path, dataset, "hotpotqa")

    def test_bad_records(self, tmp_path):
        dataset = {"name": "longbench", "path": str(tmp_path)}
        for record, message in [
            (longbench_record(0, dataset="musique"), "line 1: the record belongs to 'musique'"),
            ({"input": "q", "context": "c", "answers": ["a"]}, "line 1: the field '_id' is missing"),
            (longbench_record(0, all_classes="['a']"), "line 1: all_classes must be"),
            (longbench_record(0, answers="['a']"), "line 1: answers must be"),
        ]:
            write_jsonl(tmp_path / "hotpotqa.jsonl", [record])
            with pytest.raises(UserError, match=message):
                run(tmp_path, dataset, "hotpotqa")
        with pytest.raises(UserError, match=r"dataset\.split"):
            run(tmp_path, {**dataset, "split": "train"}, "hotpotqa")

    def test_a_download_needs_a_commit(self, tmp_path):
        for revision in (None, "main", COMMIT[:7]):
            with pytest.raises(UserError, match=r"dataset\.revision: .*commit"):
                run(tmp_path, {"name": "longbench", "path": None, "revision": revision}, "hotpotqa")
        with pytest.raises(UserError, match="no file or folder mirrors/longbench, and"):
            run(tmp_path, {"name": "longbench", "path": "mirrors/longbench"}, "hotpotqa")
        with pytest.raises(UserError, match="no file or folder /no/where"):
            run(tmp_path, {"name": "longbench", "path": "/no/where"}, "hotpotqa")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Return the folder of a replacement hub whose repositories are folders, and the list of the requested files."""
    root, asked = tmp_path / "hub", []

    def list_repo_files(repository, *, revision, repo_type):
        assert (revision, repo_type) == (COMMIT, "dataset")
        folder = root / repository
        return [str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()]

    def hf_hub_download(repository, filename, *, revision, repo_type):
        assert (revision, repo_type) == (COMMIT, "dataset")
        asked.append(f"{repository}/{filename}")
        return str(root / repository / filename)

    monkeypatch.setattr(huggingface_hub, "list_repo_files", list_repo_files)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hf_hub_download)
    return root, asked


class TestHub:
    dataset = {"name": "longbench", "path": None, "revision": COMMIT}  # noqa: RUF012

    def archive(self, root, members):
        (root / "THUDM/LongBench").mkdir(parents=True)
        with zipfile.ZipFile(root / "THUDM/LongBench/data.zip", "w") as archive:
            for name, content in members.items():
                archive.writestr(name, content)

    def test_the_archive_of_the_data_set_itself(self, tmp_path, hub):
        root, asked = hub
        lines = "".join(json.dumps(longbench_record(i)) + "\n" for i in range(3))
        self.archive(root, {"data/hotpotqa.jsonl": lines, "data/hotpotqa_e.jsonl": "other"})
        rows = run(tmp_path, self.dataset, "hotpotqa")
        assert [row["example_id"] for row in rows] == ["id0", "id1", "id2"]
        assert asked == ["THUDM/LongBench/data.zip"]
        meta = provenance.read_metadata(tmp_path / "out" / "source.parquet")
        assert meta["revision"] == COMMIT
        assert meta["source"] == f"THUDM/LongBench@{COMMIT}"

    def test_bad_archives(self, tmp_path, hub):
        root, _ = hub
        self.archive(root, {"data/hotpotqa.jsonl": json.dumps(longbench_record(0)) + "\n{\n"})
        with pytest.raises(UserError, match=r"data\.zip/data/hotpotqa\.jsonl, line 2: malformed"):
            run(tmp_path, self.dataset, "hotpotqa")
        with pytest.raises(UserError, match=r"has no data/musique\.jsonl"):
            run(tmp_path, self.dataset, "musique")
        (root / "THUDM/LongBench/data.zip").write_bytes(b"x")
        with pytest.raises(UserError, match=r"data\.zip cannot be read"):
            run(tmp_path, self.dataset, "hotpotqa")

    @pytest.mark.parametrize(
        "names",
        [
            ["hotpotqa/test/0000.parquet", "hotpotqa/test/0001.parquet", "hotpotqa_e/test/0000.parquet"],
            ["data/hotpotqa/test-0-of-2.parquet", "data/hotpotqa/test-1-of-2.parquet", "data/musique/t.parquet"],
            ["data/hotpotqa-0-of-2.parquet", "data/hotpotqa-1-of-2.parquet", "data/hotpotqa_e-0-of-1.parquet"],
        ],
    )
    def test_a_parquet_mirror(self, tmp_path, hub, names):
        root, asked = hub
        for i, name in enumerate(names):
            file = root / "some/mirror" / name
            file.parent.mkdir(parents=True, exist_ok=True)
            pq.write_table(pa.Table.from_pylist([longbench_record(i)]), file)
        rows = run(tmp_path, {**self.dataset, "path": "some/mirror"}, "hotpotqa")
        assert [row["example_id"] for row in rows] == ["id0", "id1"]
        assert asked == [f"some/mirror/{name}" for name in names[:2]]
        with pytest.raises(UserError, match=r"neither data\.zip nor Parquet files of qasper"):
            run(tmp_path, {**self.dataset, "path": "some/mirror"}, "qasper")

    def test_templates_come_with_the_data(self, hub):
        root, _ = hub
        self.archive(root, {})
        assert official(self.dataset, "prompts", "hotpotqa") is None
        (root / "THUDM/LongBench/config").mkdir()
        (root / "THUDM/LongBench/config/dataset2prompt.json").write_text('{"hotpotqa": "{context} {input}"}')
        entry = official(self.dataset, "prompts", "hotpotqa")
        assert entry.value == "{context} {input}"
        assert entry.source == f"THUDM/LongBench@{COMMIT}/config/dataset2prompt.json"

    @pytest.mark.parametrize("error", [httpx.ConnectError("no route"), OSError("disk full"), ValueError("bad name")])
    def test_a_failed_download_is_one_sentence(self, tmp_path, monkeypatch, error):
        def fail(*_args, **_kwargs):
            raise error

        monkeypatch.setattr(huggingface_hub, "list_repo_files", fail)
        with pytest.raises(UserError, match=f"cannot be downloaded from the hub: {error}"):
            run(tmp_path, self.dataset, "hotpotqa")


class TestSynthetic:
    dataset = {"name": "synthetic", "path": None, "lengths": [256, 512], "n_per_length": 3, "seed": 5}  # noqa: RUF012

    def test_the_same_seed_gives_the_same_examples(self, tmp_path):
        rows = run(tmp_path, self.dataset, "reader_qa")
        assert rows == run(tmp_path, self.dataset, "reader_qa")
        assert rows != run(tmp_path, {**self.dataset, "seed": 6}, "reader_qa")
        assert len(rows) == 6
        assert {"kind"} <= set(json.loads(rows[0]["meta"]))

    @pytest.mark.parametrize(
        ("wrong", "key"),
        [({"lengths": None}, "lengths"), ({"n_per_length": None}, "n_per_length"), ({"lengths": [1]}, "dataset")],
    )
    def test_what_it_needs(self, tmp_path, wrong, key):
        with pytest.raises(UserError, match=key):
            run(tmp_path, {**self.dataset, **wrong}, "reader_qa")


def test_local_source_names_the_file_that_a_job_reads(tmp_path):
    path = write_jsonl(tmp_path / "repobench-p.jsonl", [longbench_record(0)])
    assert local_source({"name": "longbench", "path": str(tmp_path)}, "repobench_p") == path
    assert local_source({"name": "longbench", "path": None}, "hotpotqa") is None
    assert local_source({"name": "longbench", "path": "some/mirror"}, "hotpotqa") is None
    assert local_source({"name": "synthetic", "path": None}, "reader_qa") is None


def test_unknown_names(tmp_path):
    for dataset, task in [({"name": "books"}, "x"), ({"name": "longbench", "path": "x"}, "hotpot")]:
        with pytest.raises(UserError, match="choose"):
            run(tmp_path, dataset, task)


def test_as_a_job(tmp_path, capsys):
    path = write_jsonl(tmp_path / "mine.jsonl", [example(0)])
    output = tmp_path / "out" / "source.parquet"

    def args(path):
        return ["--spec", json.dumps({"dataset": own(path)}), "--task", "mine", "--output", str(output)]

    assert job.main(args(tmp_path / "nowhere")) == 2
    assert capsys.readouterr().err == f"dataset.path: there is no file or folder {tmp_path / 'nowhere'}\n"
    assert job.main(args(path)) == 0
    assert output.is_file()
