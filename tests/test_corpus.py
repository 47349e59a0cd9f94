"""Test that books from every kind of source are cleaned and cut into windows."""

from __future__ import annotations

import gzip
import json

import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kv_transition.data.tokens import load_tokenizer
from kv_transition.errors import UserError
from kv_transition.provenance import read_metadata
from kv_transition.studies.perplexity import windows as job
from kv_transition.studies.perplexity.corpus import books
from kv_transition.studies.perplexity.pg19 import clean
from kv_transition.studies.perplexity.settings import Perplexity
from kv_transition.studies.perplexity.windows import bos_of, cut, starts, windows_of

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def section(**keys) -> dict:
    return Perplexity(**keys).model_dump()


def texts(**keys) -> dict[str, str]:
    return {name: read() for name, read in books(section(**keys), 0).items()}


class TestSources:
    def test_a_folder_of_texts(self, tmp_path):
        (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\rthree\n")
        (tmp_path / "part").mkdir()
        (tmp_path / "part" / "a.txt.gz").write_bytes(gzip.compress("Zoë".encode()))
        (tmp_path / "list.jsonl").write_text("not a book")
        assert texts(path=str(tmp_path)) == {"b": "one\ntwo\nthree\n", "part/a": "Zoë"}
        assert texts(path=str(tmp_path / "b.txt")) == {"b": "one\ntwo\nthree\n"}

    @pytest.mark.parametrize("kind", ["parquet", "jsonl", "jsonl.gz"])
    def test_a_table(self, tmp_path, kind):
        rows = [{"book": 7, "body": "a\r\nb"}, {"book": 3, "body": "c"}]
        path = tmp_path / f"books.{kind}"
        if kind == "parquet":
            pq.write_table(pa.Table.from_pylist(rows), path)
        else:
            lines = "\n".join(map(json.dumps, rows)).encode()
            path.write_bytes(gzip.compress(lines) if kind.endswith("gz") else lines)
        named = texts(path=str(path), text_field="body", book_field="book")
        assert named == {"3": "c", "7": "a\nb"}
        # a book without a name is named after its text, independent of its position in the file
        assert set(texts(path=str(tmp_path), text_field="body").values()) == {"a\nb", "c"}
        with pytest.raises(UserError, match=r"perplexity\.text_field: .*(row|line) 1 has no 'text'; .* book, body"):
            texts(path=str(path))
        with pytest.raises(UserError, match=r"'book' must be a text, not int"):
            texts(path=str(path), text_field="book")

    def test_what_is_wrong_is_named(self, tmp_path):
        with pytest.raises(UserError, match=r"perplexity\.path: there is no file or folder .*nowhere"):
            books(section(path=str(tmp_path / "nowhere")), 0)
        with pytest.raises(UserError, match=r"contains no book: no file ends in \.txt, \.txt\.gz"):
            books(section(path=str(tmp_path)), 0)
        (tmp_path / "a.md").write_text("x")
        with pytest.raises(UserError, match=r"a\.md must end in \.txt"):
            books(section(path=str(tmp_path / "a.md")), 0)
        (tmp_path / "a.txt").write_bytes(b"caf\xe9")
        with pytest.raises(UserError, match=r"a\.txt: byte 4 is not UTF-8"):
            texts(path=str(tmp_path))
        (tmp_path / "a.txt.gz").write_bytes(b"no gzip")
        with pytest.raises(UserError, match="two books are named 'a'"):
            texts(path=str(tmp_path))
        (tmp_path / "a.txt").unlink()
        with pytest.raises(UserError, match=r"a\.txt\.gz cannot be read"):
            texts(path=str(tmp_path))
        (tmp_path / "b.parquet").write_bytes(b"no parquet")
        with pytest.raises(UserError, match=r"b\.parquet cannot be read"):
            texts(path=str(tmp_path / "b.parquet"))

    @pytest.mark.parametrize(
        "names",
        [
            [
                "data/test-00000-of-00002.parquet",
                "data/test-00001-of-00002.parquet",
                "data/train-0-of-1.parquet",
            ],
            ["test/1.txt", "test/2.txt", "validation/3.txt"],
            ["test.jsonl", "train.jsonl"],
        ],
    )
    def test_a_hub_repository_at_a_commit(self, tmp_path, monkeypatch, names):
        for i, name in enumerate(names):
            file = tmp_path / name
            file.parent.mkdir(parents=True, exist_ok=True)
            if name.endswith(".parquet"):
                pq.write_table(pa.table({"text": [f"book {i}"]}), file)
            else:
                file.write_text(f"book {i}" if name.endswith(".txt") else json.dumps({"text": f"book {i}"}))
        asked = []

        def list_repo_files(repository, *, revision, repo_type):
            assert (repository, revision, repo_type) == ("some/books", COMMIT, "dataset")
            return ["README.md", *names]

        def download(repository, path, *, revision, repo_type):
            assert (repository, revision, repo_type) == ("some/books", COMMIT, "dataset")
            asked.append(path)
            return str(tmp_path / path)

        monkeypatch.setattr(huggingface_hub, "list_repo_files", list_repo_files)
        monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
        own = {"path": "some/books", "revision": COMMIT}
        wanted = [name for name in names if name.startswith(("test", "data/test"))]
        assert sorted(texts(**own).values()) == [f"book {i}" for i in range(len(wanted))]
        assert asked == wanted
        with pytest.raises(UserError, match=r"^perplexity\.path: some/books at 0123.* no file of the split 'dev'"):
            texts(**own, split="dev")

    def test_a_failed_download_is_one_sentence(self, monkeypatch):
        def fail(*_, **__):
            raise OSError("no route")

        monkeypatch.setattr(huggingface_hub, "list_repo_files", fail)
        with pytest.raises(UserError, match=r"^perplexity\.path: some/books at .* cannot be downloaded .*: no route"):
            texts(path="some/books", revision=COMMIT)

    def test_synthetic_documents(self):
        own = section(corpus="synthetic", books=2, windows_per_book=1)
        first, again = ({name: read() for name, read in books(own, 200).items()} for _ in range(2))
        assert first == again
        assert len(set(first.values())) == 2
        assert set(books(own | {"seed": 1}, 200)).isdisjoint(first)
        with pytest.raises(UserError, match=r"perplexity\.context_tokens: .* at most 4352 tokens"):
            books(own, 5000)
        with pytest.raises(UserError, match=r"perplexity\.split: .*not 'dev'"):
            books(own | {"split": "dev"}, 200)


BOOK = """\r
\r
Produced by A. Volunteer and the Online Distributed\r
Proofreading Team at http://www.example.org\r
\r
\r
Transcriber's Note\r
\r
Obvious errors have been\r
corrected.\r
\r
[Transcriber's note: [=e] is an e\r
with a macron.]\r
\r
A TITLE\r
\r
 Produced by hand, the lace was sold. [Illustration: a loom]\r
\r
{body}\r
\r
THE END\r
\r
Transcriber's Notes:\r
\r
Page 4, "teh" changed to "the".\r
\r
Page 9 as well.\r
\r
End of Project Gutenberg's A Title, by Somebody\r
\r
*** \r
"""


class TestCleaning:
    def test_what_goes_and_what_stays(self):
        body = "\r\n\r\n".join(f"Paragraph {i} of the book." for i in range(60))
        cleaned = clean(BOOK.replace("{body}", body))
        assert cleaned.split("\n\n") == [
            "A TITLE",
            " Produced by hand, the lace was sold. [Illustration: a loom]",
            *(f"Paragraph {i} of the book." for i in range(60)),
            "THE END",
        ]

    def test_a_text_without_such_lines_is_left_alone(self):
        body = "One.\n\n  Two, by hand.\n\nThe end of project work.\n"
        assert clean(body) == body.rstrip()

    def test_words_of_the_story_are_no_end(self):
        """Check that a mention in the first half of a book is part of the book."""
        text = "End of Project Gutenberg, he said.\n\n" + "More.\n\n" * 20
        assert clean(text) == text.rstrip()

    def test_real_books(self, kvt_data):
        files = sorted((kvt_data / "pg19").glob("*.txt.gz"))
        assert files
        for file in files:
            raw = gzip.decompress(file.read_bytes()).decode()
            cleaned = clean(raw)
            assert "\r" not in cleaned
            for word in ("gutenberg", "proofread", "transcriber", "pgdp"):
                assert word not in cleaned.lower()
            # only a few lines of front and back matter are removed
            assert len(raw.replace("\r", "")) - 1200 < len(cleaned)


lengths = st.lists(st.integers(1, 40), min_size=1, max_size=4, unique=True).map(sorted)


class TestWindows:
    @given(n=st.integers(0, 300), contexts=lengths, stride=st.integers(1, 30), bos=st.sampled_from([[], [1000]]))
    def test_scored_tokens_are_disjoint_and_lengths_exact(self, n, contexts, stride, bos):
        ids = list(range(n))
        scored = []
        for start in starts(n, contexts, stride):
            made = windows_of(ids, start, contexts, stride, bos)
            scored += made[0]["target_ids"][1:]
            for own, row in zip(contexts, made, strict=True):
                assert row["context_tokens"] == len(row["context_ids"]) == own + len(bos)
                assert row["context_ids"][: len(bos)] == bos
                text = row["context_ids"][len(bos) :] + row["target_ids"]
                # a contiguous part of the book
                assert text == ids[row["context_start"] : row["context_start"] + own + stride + 1]
                assert row["target_ids"] == made[0]["target_ids"]
        assert len(set(scored)) == len(scored)
        assert len(scored) % stride == 0
        # as many windows as fit
        room = max(0, n - max(contexts) - 1)
        assert len(scored) // stride == room // stride

    @pytest.fixture
    def tokenizer(self):
        return load_tokenizer("resources/tiny-reader")

    @pytest.fixture
    def corpus(self, tmp_path):
        for i in range(6):
            (tmp_path / f"{i}.txt").write_text(f"{1850 + i} . The . " * (10 if i == 3 else 200))
        return {"path": str(tmp_path), "context_tokens": [8, 32], "stride": 16}

    def test_books_stay_apart_and_choices_are_nested(self, tokenizer, corpus):
        (short, _), about = cut(section(**corpus, books=2, windows_per_book=3), tokenizer)
        assert len(about["books"]) == 2
        assert {row["book_id"] for row in short} == set(about["books"])
        (more, _), wider = cut(section(**corpus, books=4, windows_per_book=5), tokenizer)
        key = {(row["book_id"], row["window"]) for row in more}
        assert {(row["book_id"], row["window"]) for row in short} <= key
        assert wider["books"][:2] == about["books"]
        for row in more:
            words = tokenizer.decode(row["context_ids"][1:] + row["target_ids"]).split()
            years = {word for word in words if word.isdigit()}
            assert years == {str(1850 + int(row["book_id"]))}, "a window is of one book"
        _, everything = cut(section(**corpus), tokenizer)
        assert everything["too_short"] == ["3"]
        assert sorted(everything["books"]) == ["0", "1", "2", "4", "5"]
        (other, _), _ = cut(section(**corpus, books=2, windows_per_book=3, seed=1), tokenizer)
        assert other != short

    def test_the_bins_have_the_same_scored_tokens(self, tokenizer, corpus):
        short, long = cut(section(**corpus, windows_per_book=2), tokenizer)[0]
        assert [row["target_ids"] for row in short] == [row["target_ids"] for row in long]
        assert [(r["book_id"], r["window"]) for r in short] == [(r["book_id"], r["window"]) for r in long]
        assert ({r["context_tokens"] for r in short}, {r["context_tokens"] for r in long}) == ({8}, {32})
        assert ({r["bin"] for r in short}, {r["bin"] for r in long}) == ({0}, {1})

    def test_the_first_token_is_the_tokenizers(self, tokenizer, corpus, kvt_data):
        assert bos_of(tokenizer, "auto") == [tokenizer.bos_token_id] == [1]
        assert bos_of(tokenizer, "never") == []
        assert bos_of(load_tokenizer(str(kvt_data / "tokenizers/mistral")), "auto") == [1]
        # this tokenizer adds no token before a text
        assert bos_of(load_tokenizer(str(kvt_data / "tokenizers/qwen2.5")), "auto") == []
        without = cut(section(**corpus, bos="never", books=1), tokenizer)[0][0][0]
        with_ = cut(section(**corpus, books=1), tokenizer)[0][0][0]
        assert len(without["context_ids"]) == len(with_["context_ids"]) == 8
        assert 1 not in without["context_ids"]

    def test_no_book_is_long_enough(self, tokenizer, corpus):
        with pytest.raises(UserError, match=r"perplexity\.context_tokens: a window needs 916 tokens .* of 6 has 800"):
            cut(section(**corpus | {"context_tokens": [900]}), tokenizer)

    def test_as_a_job(self, tmp_path, corpus, capsys):
        spec = {"perplexity": section(**corpus), "model": {"name": "resources/tiny-reader", "revision": None}}
        outputs = [str(tmp_path / f"out/{b}.parquet") for b in range(2)]
        arguments = ["--spec", json.dumps(spec), "--output", *outputs]
        assert job.main(arguments) == 0
        assert "1 books are too short" in capsys.readouterr().err
        about = read_metadata(outputs[1])
        assert about["corpus"] == "text"
        assert json.loads(about["too_short"]) == ["3"]
        rows = pq.read_table(outputs[1]).to_pylist()
        assert rows[0]["context_tokens"] == 32
        spec["perplexity"]["path"] = str(tmp_path / "nowhere")
        assert job.main(["--spec", json.dumps(spec), "--output", *outputs]) == 2
        assert capsys.readouterr().err.startswith("perplexity.path: there is no file or folder")
