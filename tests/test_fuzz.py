"""Test mutated files: every parser succeeds or raises one sentence, in limited time, and writes nothing.

Seeds are real files. ``KVT_FUZZ=20000`` tries that many mutations instead of 500; ``KVT_FUZZ_OUTPUT`` names the JSON
file of the figures.
"""

from __future__ import annotations

import gzip
import json
import os
import random
import signal
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import yaml
from project import ROOT, SMALL

from kv_transition import parsing, provenance, settings, specs
from kv_transition.budget import Budget
from kv_transition.data import jsonl, longbench, model_files, templates
from kv_transition.data.download import normalize
from kv_transition.data.prompts import Template
from kv_transition.data.tasks import get_task
from kv_transition.errors import UserError
from kv_transition.policies import catalog
from kv_transition.stats import frames
from kv_transition.studies import study
from kv_transition.studies.chat import judge, multiturn, rules
from kv_transition.studies.chat.checks import validate
from kv_transition.studies.grid import score
from kv_transition.studies.perplexity import corpus

TRIES = int(os.environ.get("KVT_FUZZ", "500"))
CPU_S = 20
"""seconds of CPU time that a parser may take"""
READER = ROOT / "resources/tiny-reader"

# Fragments that parsers often fail on, inserted at random: numbers, encodings, structure, names of other types.
TOKENS = [
    b"9" * 5000, b"1e999", b"-0", b"NaN", b"Infinity", b"null", b"true", b"[", b"]", b"{", b"}", b"[" * 2000, b'"',
    b"\\ud800", b"\\u0000", b"\0", b"\xff\xfe", b"\xef\xbb\xbf", b"\r\n", b"\n", b"\t", b":", b",", b"&a ", b"*a",
    b"<<: *a", b"!!binary ", b"!!timestamp ", b"2024-01-01", b"..", b"../../", b"/dev/null", b"%s", b"{0}",
    b"(a+)+$", b"a{99999}",
    b"\xe2\x80\xae", b"\xf0\x9f\x92\xa9", b"PAR1", b"\x7f" * 8, b"---\n", b"? ", b"- ", b"# ", b"'", b"1_000", b"0x10",
]  # fmt: skip


def mutated(content: bytes, rng: random.Random) -> bytes:
    """Change a file in one to four places: flip bits, remove, repeat or replace pieces, insert tokens."""
    if rng.random() < 0.03:
        return content.decode("utf-8", "replace").encode(rng.choice(["utf-16", "latin-1", "utf-8-sig"]), "replace")
    made = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(made) + 1)
        end = min(len(made), at + int(rng.paretovariate(0.5)))
        match rng.randrange(6):
            case 0 if made:
                made[at % len(made)] ^= 1 << rng.randrange(8)
            case 1:
                del made[at:end]
            case 2:
                made[at:at] = made[at:end]
            case 3:
                made[at:end] = rng.choice(TOKENS)
            case 4:
                made[at:at] = rng.choice(TOKENS)
            case 5:
                del made[at:]
    return bytes(made[:2_000_000])


@contextmanager
def bounded() -> Iterator[None]:
    """Fail after `CPU_S` seconds of CPU time, because the parser hangs."""

    def late(*_: object) -> None:
        raise TimeoutError(f"more than {CPU_S} s of computing")

    before = signal.signal(signal.SIGVTALRM, late)
    signal.setitimer(signal.ITIMER_VIRTUAL, CPU_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


Parser = tuple[str, bytes, Callable[[Path], object]]
"""the name of the file, its valid content, and the function that reads it"""


def _experiment(path: Path) -> object:
    found = settings.load(path)
    specs.check(found)
    return found


def _set(path: Path) -> object:
    text = path.read_bytes().decode("utf-8", "replace")
    return settings.parse(settings.override(SMALL, [line for line in text.split("\n") if line]))


def _records(path: Path) -> object:
    dataset = {"name": "jsonl", "path": str(path)}
    return normalize(jsonl.load(dataset, "mine"), get_task("jsonl", "mine"))


def _longbench(path: Path) -> object:
    return list(longbench._from_archive(path, "qasper"))


def _book(path: Path) -> object:
    section = {"corpus": "text", "path": str(path), "revision": None, "text_field": "text", "book_field": None}
    return [read() for read in corpus.books(section, 10).values()]


def _conversations(source: str) -> Callable[[Path], object]:
    return lambda path: multiturn.read(str(path), source)


def _template(path: Path) -> object:
    given = {"name": "jsonl", "prompts": str(path)}
    found = templates.official(given, "prompts", "qasper")
    return Template.parse(found.value, "the template")


def _check(path: Path) -> object:
    given = parsing.parse_json(parsing.read_text(path), str(path))
    return rules.passes(validate(given, "conversation"), "An answer of some words, and a" + "a" * 40 + "!")


def _cell(path: Path) -> object:
    with suppress(score._UnfitError):
        score._read_cell(str(path), {})
    study._hash(path, "cell_hash")
    frames.read_table(str(path))
    provenance.read_metadata(path)
    return parsing.read_parquet(path)


def _manifest(path: Path) -> object:
    return score._read_task(str(path))


def _index(path: Path) -> object:
    return study._hash(path, "prompts")


def _model_config(path: Path) -> object:
    from kv_transition.plan.model_size import read_size

    config = model_files.read_config(str(path.parent))
    return config and (read_size(config), model_files.positions(config))


def _tokenizer(path: Path) -> object:
    return model_files._check_tokenizer(path.parent)


def _budget(path: Path) -> object:
    text = path.read_bytes().decode("utf-8", "replace")
    return Budget.parse(text) if text[:1] in ("r", "t") else Budget.of_fraction(text)


def _policy(path: Path) -> object:
    for found in (catalog.describe, catalog._read, catalog._parsed):
        found.cache_clear()
    kind, options = catalog.resolve("mine", {"kind": str(path)})
    return catalog.statistics(kind), options


def _verdict(path: Path) -> object:
    from kv_transition.engines.openai_forms import Reply

    return judge.judged(Reply(text=path.read_bytes().decode("utf-8", "replace")))


def _prefill(path: Path) -> object:
    from kv_transition.cache.store import PrefillStore

    return PrefillStore(path.parent, "always").load(path.stem)


def _gguf(path: Path) -> object:
    from kv_transition.data import gguf

    gguf._sha256.cache_clear()
    return gguf.config(str(path))


def seeds(folder: Path) -> dict[str, Parser]:
    """Return the parsers by name, each with a valid file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from kv_transition.provenance import rows_to_table
    from kv_transition.studies.grid.tables import CELLS

    example = {"id": "a", "question": "Who?", "context": "Ann did.", "answers": ["Ann"], "meta": {"kind": "one"}}
    lines = b"".join(json.dumps(example | {"id": i, "context": f"Ann did {i}."}).encode() + b"\n" for i in range(5))
    qasper = {"_id": "a", "input": "Who?", "context": "Ann did.", "answers": ["Ann"], "all_classes": None}
    with zipfile.ZipFile(folder / "data.zip", "w") as archive:
        archive.writestr("data/qasper.jsonl", json.dumps(qasper) + "\n")
    pq.write_table(rows_to_table([{"task": "t", "example_id": str(i), "cell_hash": "x"} for i in range(5)], CELLS),
                   folder / "cell.parquet")  # fmt: skip
    pq.write_table(pa.table({"text": ["A book.", "Another one."]}), folder / "book.parquet")
    turns = {"id": "a", "turns": [{"role": "user", "content": "Hi", "checks": [
        {"kind": "max_words", "value": 5}]}, {"role": "assistant", "content": "Hello"}]}  # fmt: skip
    bench = {"question_id": 1, "category": "writing", "turns": ["Write.", "Shorter."]}
    index = {"code": "c", "model": {"name": "m"}, "prompts": ["p"]}
    manifest = {"version": 1, "task": "reader_qa", "dataset": "synthetic", "bins": [{"bin": 0, "n": 1}]}
    policy = (ROOT / "src/kv_transition/policies/knorm.py").read_bytes()
    found: dict[str, Parser] = {
        "experiment": ("e.yaml", (ROOT / "config/config.yaml").read_bytes(), _experiment),
        "experiment, small": ("e.yaml", yaml.safe_dump(SMALL).encode(), _experiment),
        "--set": ("set.txt", b"model.device=cpu\nkv.budgets=[0.5, {tokens: 8}]\ndecoding.seed=3", _set),
        "records": ("mine.jsonl", lines, _records),
        "records, gzip": ("mine.jsonl.gz", gzip.compress(lines, mtime=0), _records),
        "archive": ("data.zip", (folder / "data.zip").read_bytes(), _longbench),
        "book": ("book.txt", b"Once upon a time.\n" * 20, _book),
        "book, gzip": ("book.txt.gz", gzip.compress(b"Once upon a time.\n" * 20, mtime=0), _book),
        "books": ("book.jsonl", b'{"text": "A book."}\n{"text": "Another."}\n', _book),
        "books, Parquet": ("book.parquet", (folder / "book.parquet").read_bytes(), _book),
        "conversations": ("c.jsonl", json.dumps(turns).encode() + b"\n", _conversations("turns")),
        "conversations, list": ("c.json", json.dumps([turns]).encode(), _conversations("turns")),
        "MT-bench": ("c.jsonl", json.dumps(bench).encode() + b"\n", _conversations("mt_bench")),
        "templates": ("t.json", b'{"qasper": "Text: {context}\\nQuestion: {input}\\nAnswer:"}', _template),
        "check": ("check.json", b'{"kind": "matches", "value": "^a(b|c)*[d-f]{2,3}$", "since": 1}', _check),
        "cell": ("cell.parquet", (folder / "cell.parquet").read_bytes(), _cell),
        "manifest": ("manifest.json", json.dumps(manifest).encode(), _manifest),
        "prefill index": ("bin0.json", json.dumps(index).encode(), _index),
        "model config": ("config.json", (READER / "config.json").read_bytes(), _model_config),
        "tokenizer": ("tokenizer.json", (READER / "tokenizer/tokenizer.json").read_bytes(), _tokenizer),
        "weights": ("model.safetensors", (READER / "model.safetensors").read_bytes()[:40_000], model_files.read_header),
        "budget": ("budget.txt", b"r0.25", _budget),
        "policy file": ("policy.py", policy, _policy),
        "verdict of a judge": ("verdict.txt", b'```json\n{"verdict": "yes", "reason": "it does"}\n```', _verdict),
        "profile": ("config.yaml", (ROOT / "profiles/default/config.yaml").read_bytes(), _profile),
        "prefill": ("p.safetensors", _stored_prefill(folder), _prefill),
    }
    if (made := _small_gguf(folder)) is not None:
        found["GGUF"] = ("m.gguf", made, _gguf)
    return found


def _profile(path: Path) -> object:
    from kv_transition.yaml_text import read_yaml

    return read_yaml(path, "profile")


def _stored_prefill(folder: Path) -> bytes:
    from test_store import PrefillStore, random_prefill

    store = PrefillStore(folder / "store", "always")
    store.save("p", random_prefill(["plain"], 3))
    return store.path("p").read_bytes()


def _small_gguf(folder: Path) -> bytes | None:
    try:
        import gguf
        import numpy as np
    except ImportError:
        return None
    writer = gguf.GGUFWriter(str(folder / "m.gguf"), "llama")
    writer.add_block_count(1)
    writer.add_embedding_length(32)
    writer.add_head_count(2)
    writer.add_token_list(["a", "b"])
    writer.add_tensor("token_embd.weight", np.zeros((2, 32), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return (folder / "m.gguf").read_bytes()


def test_every_seed_is_read(tmp_path):
    """Check that every seed is valid; otherwise all its mutations would be refused for the same reason."""
    for name, (file, content, read) in seeds(tmp_path).items():
        folder = tmp_path / name.replace(" ", "_")
        folder.mkdir()
        (folder / file).write_bytes(content)
        if name != "weights":  # truncated on purpose, because the whole file would be slow to mutate
            assert read(folder / file) is not None or name == "tokenizer", name


@pytest.mark.slow
def test_a_mutated_file_is_one_sentence_or_is_read(tmp_path, capsys):
    rng = random.Random(int(os.environ.get("KVT_FUZZ_SEED", "0")))
    parsers = seeds(tmp_path)
    outcome: dict[str, Counter[str]] = {name: Counter() for name in parsers}
    faults: list[str] = []
    for number in range(TRIES):
        name = list(parsers)[number % len(parsers)]
        file, content, read = parsers[name]
        folder = tmp_path / "tried"
        folder.mkdir(exist_ok=True)
        path = folder / file
        path.write_bytes(mutated(content, rng))
        try:
            with bounded():
                read(path)
            outcome[name]["read"] += 1
        except UserError as refused:
            if len(str(refused).splitlines()) != 1:
                faults.append(f"{name}: no sentence but {refused}")
            outcome[name]["refused"] += 1
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            outcome[name]["fault"] += 1
            kept = tmp_path / f"fault{len(faults)}-{file}"
            path.replace(kept)
            faults.append(f"{name}: {type(error).__name__}: {str(error)[:200]} ({kept})")
        assert {each.name for each in folder.iterdir()} <= {file}, f"{name} wrote something"
        path.unlink(missing_ok=True)
    if output := os.environ.get("KVT_FUZZ_OUTPUT"):
        total = sum(outcome.values(), Counter())
        provenance.write_json(output, {"tries": TRIES, **total, "parsers": {k: dict(v) for k, v in outcome.items()}})
    assert not faults, "\n".join(faults)
