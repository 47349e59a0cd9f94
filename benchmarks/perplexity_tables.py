"""Do sinks matter, and does merging beat dropping the same spans? Measured on two small models, with intervals.

    KVT_DATA=FOLDER python benchmarks/perplexity_tables.py sinks|merging [--output FILE.json]
    python benchmarks/perplexity_tables.py --write docs/perplexity.md FILE.json ...

KVT_DATA holds ``stories260K-hf`` (a pretrained model of 260 k parameters, context 512) and ``pg19`` (books). Windows
are cut, read, compressed and scored by the code that experiments run, on one core; a few minutes each. The second form
writes the tables of such files into the page, so that no number there is typed by hand.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import polars as pl
from document import put, table
from sinks import stories

from kv_transition import labels, specs
from kv_transition.engines.local import LocalEngine
from kv_transition.labels import p_value
from kv_transition.paths import Paths
from kv_transition.provenance import git_commit, rows_to_table, write_table
from kv_transition.run import job
from kv_transition.run.prefill import store_of
from kv_transition.settings import parse
from kv_transition.stats.examples import Statistics
from kv_transition.stats.quotients import quotient
from kv_transition.studies.perplexity import run, windows
from kv_transition.studies.perplexity import specs as perplexity_specs
from kv_transition.studies.perplexity.analysis import merge_against_drop, perplexity, read_windows
from kv_transition.studies.perplexity.tables import PERPLEXITY

RESULTS = Path(__file__).resolve().parent / "results"
HARDWARE = "2 CPU cores, one thread"
STORIES, READER = "stories260K", "tiny reader"
ALPHA = 0.05
SAMPLES = 40  # of stories260K's own language
SINKS = (0, 1, 4)
THRESHOLDS = (0.3, 0.5, 0.7)
BOOKS = {"corpus": "pg19", "books": 10}
Row = dict[str, Any]


def model(name: str) -> Row:
    folder = f"{os.environ['KVT_DATA']}/stories260K-hf" if name == STORIES else "resources/tiny-reader"
    return {"name": folder, "dtype": "float32", "device": "cpu"}


def books() -> Row:
    return BOOKS | {"path": f"{os.environ['KVT_DATA']}/pg19"}


def sink_experiments() -> dict[str, Row]:
    """Two contexts, one within and one of half as much again as the length that the model was trained for."""
    text = {"context_tokens": [256, 768], "stride": 64, "windows_per_book": 1}
    return {
        name: {
            "model": model(STORIES),
            "perplexity": books() | text | {"streaming": name == "streamed"},
            "kv": {
                "policies": {"full": {}}
                | {f"sinks_{n}": {"kind": "streaming_llm", "n_sink": n, "positions": positions} for n in SINKS},
                "budgets": [{"tokens": t} for t in tokens],
            },
        }
        for name, positions, tokens in (
            ("streamed", "cache", [64]),
            ("compressed", "cache", [64, 16]),
            ("compressed, original positions", "original", [64, 16]),
        )
    }


def write_stories(folder: Path) -> None:
    """Samples of stories260K's own language, a file each."""
    engine = LocalEngine.from_pretrained(model(STORIES)["name"], device="cpu")
    for number, ids in enumerate(stories(engine, SAMPLES)):
        text = engine.tokenizer.decode(ids, skip_special_tokens=True)
        (folder / f"{number:03}.txt").write_text(text, encoding="utf-8")


def merging_experiments(samples: Path) -> dict[str, Row]:
    policies: dict[str, Row] = {"full": {}}
    for name, kind, options in (
        ("merge", "entropy_merge", {}),
        ("merge, log m", "entropy_merge", {"count_bias": True}),
        ("drop", "entropy_drop", {}),
    ):
        key = name.replace(", ", "_").replace(" ", "_")
        policies[key] = {"kind": kind} | options
        for threshold in THRESHOLDS:
            policies[f"{key}-t{threshold}"] = {"kind": kind, "target": "threshold", "threshold": threshold} | options
    kv = {"policies": policies, "budgets": [0.5, 0.3, 0.2]}
    on_books = books() | {"context_tokens": [384], "stride": 96, "windows_per_book": 32}
    on_samples = {"corpus": "text", "path": str(samples), "context_tokens": [320], "stride": 96}
    own_text = {"corpus": "synthetic", "context_tokens": [512], "stride": 64, "books": 24, "windows_per_book": 2}
    return {
        f"{STORIES} on PG-19": {"model": model(STORIES), "perplexity": on_books, "kv": kv},
        f"{STORIES} on its own stories": {"model": model(STORIES), "perplexity": on_samples, "kv": kv},
        f"{READER} on its own documents": {"model": model(READER), "perplexity": own_text, "kv": kv},
    }


def scored(config: Row, folder: Path) -> pl.DataFrame:
    """The rows of tables.PERPLEXITY of an experiment, all of it in this process."""
    settings = parse(config | {"output": {"dir": str(folder)}})
    specs.check(settings)
    files, corpus = Paths(str(folder), "run"), settings.perplexity.corpus
    bins = [files.windows(corpus, b) for b in range(len(settings.perplexity.context_tokens))]
    windows.write(perplexity_specs.windows(settings), bins)
    engine = job.load_engine(specs.prefill(settings)["model"], threads=1)
    made = []
    for policy, budget in perplexity_specs.cells(settings):
        spec = perplexity_specs.cell(settings, policy, budget)
        for b, path in enumerate(bins):
            store = store_of(spec["model"], spec["prefill_code"], path)
            rows = run.rows(engine, job.read_bin(path), spec, store)
            made.append(files.perplexity(corpus, policy, budget, b))
            write_table(made[-1], rows_to_table(rows, PERPLEXITY), {})
    return read_windows(made)


def sinks() -> list[Row]:
    """Perplexity with each number of sinks, and over that with four on the same windows."""
    found, statistics = [], Statistics()
    for name, config in sink_experiments().items():
        with tempfile.TemporaryDirectory() as folder:
            os.environ[job.STORE_VARIABLE] = f"{folder}/prefill:always:4"
            frame = scored(config, Path(folder))
        for row in perplexity(frame, statistics).to_pylist():
            if row["bin"] is None:
                continue
            own = frame.filter(policy=row["policy"], budget=row["budget"], bin=row["bin"])
            four = frame.filter(policy=f"sinks_{SINKS[-1]}", budget=row["budget"], bin=row["bin"])
            both = own.join(four, on=["book_id", "window"], suffix="_four")
            difference = (both["nll_sum"] - both["nll_sum_four"]).to_numpy()
            codes = both["book_id"].rank("dense").to_numpy() - 1
            against = quotient(difference, both["n_tokens"].cast(float).to_numpy(), codes, statistics.confidence).exp()
            found.append({"how": name} | row | against.columns("over_four"))
    return found


def merging() -> list[Row]:
    found, statistics = [], Statistics()
    with tempfile.TemporaryDirectory() as root:
        samples = Path(root, "stories")
        samples.mkdir()
        write_stories(samples)
        for name, config in merging_experiments(samples).items():
            os.environ[job.STORE_VARIABLE] = f"{root}/prefill:always:8"
            frame = scored(config, Path(root, "results"))
            found += _merging_rows(name, frame, config["kv"]["policies"], statistics)
    return found


def _merging_rows(name: str, frame: pl.DataFrame, policies: Row, statistics: Statistics) -> list[Row]:
    found = []
    cells = {(row["policy"], row["budget"], row["bin"]): row for row in perplexity(frame, statistics).to_pylist()}
    for row in merge_against_drop(frame, policies, statistics).to_pylist():
        if row["bin"] is None:
            continue
        place = row["budget"], row["bin"]
        sides = {"merge": row["policy"], "drop": row["reference_policy"]}
        both = {side: {k: cells[policy, *place][k] for k in ("perplexity", "ratio", "ratio_low", "ratio_high")}
                for side, policy in sides.items()}  # fmt: skip
        found.append({"model": name} | row | both | {"full": cells["full", "r1", row["bin"]]["perplexity"]})
    return found


def sink_table(rows: list[Row]) -> str:
    head = ["read", "context", "entries", "sinks", "perplexity", "over the full cache's", "over 4 sinks'"]
    lines = []
    for row in sorted(rows, key=lambda r: (r["how"], r["bin"], r["budget"] != "r1", -r["budget_entries"], r["policy"])):
        full = row["policy"] == "full"
        if full and row["how"] != "compressed":
            continue  # the same however it is read: nothing is evicted
        lines.append([
            "full cache" if full else row["how"], str(row["context_max"]),
            str(row["context_max"] if full else int(row["budget_entries"])),
            "–" if full else row["policy"].removeprefix("sinks_"),
            _interval(row, "perplexity", 2), "–" if full else _interval(row, "ratio", 4),
            "–" if full or row["policy"] == f"sinks_{SINKS[-1]}" else _interval(row, "over_four", 4),
        ])  # fmt: skip
    compared = [row for row in rows if row["policy"] in [f"sinks_{n}" for n in SINKS[:-1]]]
    said = " ".join(
        f"{entries} entries: of {len(own)} comparisons with four sinks, fewer are better in "
        f"{sum(row['over_four_high'] < 1 for row in own)}, four in {sum(row['over_four_low'] > 1 for row in own)} "
        "(95 % intervals, unadjusted)."
        for entries in sorted({row["budget_entries"] for row in compared}, reverse=True)
        for own in [[row for row in compared if row["budget_entries"] == entries]]
    ).replace(".0 entries", " entries")
    return table(head, lines) + f"\n\n{said} {_counted(rows)}"


def merging_table(rows: list[Row]) -> str:
    names = list(dict.fromkeys(row["model"] for row in rows))
    head = ["model and text", "merging", "kept by", "compression", "full", "merge", "drop", "merge over drop", "p"]
    lines = [
        [
            row["model"], "with log m" if "log_m" in row["policy"] else "plain",
            labels.budget(row["budget"]) if row["budget"] != "r1" else f"h ≥ {row['policy'].rpartition('-t')[2]}",
            f"{100 * row['compression']:.1f} %", f"{row['full']:.2f}", f"{row['merge']['perplexity']:.2f}",
            f"{row['drop']['perplexity']:.2f}", _interval(row, "ratio", 4), p_value(row["p_holm"]),
        ]
        for row in sorted(rows, key=lambda r: (names.index(r["model"]), "log_m" in r["policy"],
                                               labels.budget_order(r["budget"]), r["policy"]))
    ]  # fmt: skip
    apart = max(abs(row["compression"] - row["reference_compression"]) for row in rows)
    same = f"The footprints of the two sides differ by {100 * apart:.1f} % of the full cache's bytes at most."
    counts = "\n".join(_verdict(name, [row for row in rows if row["model"] == name]) for name in names)
    return table(head, lines) + f"\n\n{counts}\n\n{same}"


def _verdict(name: str, rows: list[Row]) -> str:
    shown = [row["ratio"] < 1 for row in rows if row["p_holm"] < ALPHA]
    better = f"merging is better in {sum(shown)} of {len(rows)} comparisons, dropping in {len(shown) - sum(shown)}"
    return f"- {name}: {better}, neither is shown in the rest; {_counted(rows)}"


def _interval(row: Row, name: str, digits: int) -> str:
    return labels.interval(row[name], row[f"{name}_low"], row[f"{name}_high"], digits)


def _counted(rows: list[Row]) -> str:
    first = rows[0]
    texts = "texts" if first["corpus"] != "pg19" else "books"
    return f"n = {first['n']} windows from {first['clusters']} {texts}" + (
        ", exploratory." if first["exploratory"] else "."
    )


PARTS = {"sinks": (sinks, sink_table), "merging": (merging, merging_table)}


def write(page: Path, files: list[Path]) -> None:
    for file in files:
        found = json.loads(file.read_text(encoding="utf-8"))
        about = found["about"]
        said = f"Measured on {about['date']}, {about['hardware']}, torch {about['torch']}, commit {about['commit']}: "
        put(page, found["part"], f"{PARTS[found['part']][1](found['rows'])}\n\n{said}`{about['command']}`.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="*", help="sinks or merging; with --write the files to write")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--write", type=Path, help="the page whose tables are written")
    arguments = parser.parse_args()
    if arguments.write:
        write(arguments.write, [Path(file) for file in arguments.part])
        return
    if len(arguments.part) != 1 or arguments.part[0] not in PARTS or "KVT_DATA" not in os.environ:
        parser.error("give sinks or merging, and the data's folder in KVT_DATA")
    part, started = arguments.part[0], time.process_time()
    rows = PARTS[part][0]()
    about = {
        "date": date.today().isoformat(),
        "hardware": HARDWARE,
        "command": f"KVT_DATA=... python benchmarks/perplexity_tables.py {part}",
        "commit": git_commit(),
        "torch": version("torch"),
        "transformers": version("transformers"),
        "cpu_s": round(time.process_time() - started),
    }
    output = arguments.output or RESULTS / f"{date.today().isoformat()}-perplexity-{part}.json"
    output.write_text(json.dumps({"part": part, "about": about, "rows": rows}, indent=1) + "\n", encoding="utf-8")
    print(PARTS[part][1](rows))


if __name__ == "__main__":
    main()
