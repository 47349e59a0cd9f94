"""Run the benchmarks and write their figures and the tables of docs/benchmarks.md.

    python benchmarks/run.py [--quick] [--only grid cells statistics serving batching]
    python benchmarks/run.py --render benchmarks/results/FILE.json

Each part is a separate process, one after the other. Figures are written to ``benchmarks/results/{date}-{host
kind}.json``, whose parts are replaced one by one, so that ``--only`` repeats a part. ``--quick`` runs everything with
small sizes and writes nothing into the project. ``--render`` writes the tables of a file again.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from document import put, table

from kv_transition.provenance import git_commit, package_versions, write_json

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
PAGE = HERE.parent / "docs" / "benchmarks.md"
PARTS = {
    "grid": ("grid.py", ["--quick"]),
    "cells": ("cells.py", ["--quick"]),
    "statistics": ("attention_statistics.py", ["--lengths", "512"]),
    "serving": ("serving.py", ["--quick"]),
    "batching": ("batching.py", ["--quick"]),
}
"""each part's program, and its options for trying it out"""


def host_kind() -> str:
    """Return the properties of the machine that affect the figures: ``cpu-2core-x86_64``."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"cpu-{cores}core-{platform.machine()}"


def run_part(part: str, quick: bool) -> Any:
    script, small = PARTS[part]
    with tempfile.TemporaryDirectory() as name:
        output = Path(name) / "figures.json"
        options = small if quick else []
        subprocess.run([sys.executable, HERE / script, "--output", output, *options], check=True)
        return json.loads(output.read_text())


def conditions() -> dict[str, Any]:
    return {
        "date": datetime.date.today().isoformat(),
        "host": host_kind(),
        "python": platform.python_version(),
        "git_commit": git_commit(),
        "package_versions": package_versions(),
    }


def seconds(summary: dict[str, float]) -> str:
    return f"{summary['median_s']:.3g} ({summary['min_s']:.3g} to {summary['max_s']:.3g})"


def grid_table(figures: dict[str, Any]) -> str:
    costs = ["kvpress, CPU s", "this project, CPU s", "ratio", "floor, CPU s", "over the floor"]
    head = ["model", "tokens", "answers", *costs, "prefills / cells / analysis / other, CPU s"]
    head += ["floor: load / read / decode, CPU s", "same as one at a time", "same as kvpress"]
    rows = []
    for row in figures["rows"]:
        batch = row.get("batch", 1)
        numbers = [f"{row['kvpress_cpu_s']:.0f}" if "kvpress_cpu_s" in row else "-", f"{row['ours_cpu_s']:.0f}"]
        numbers += [f"{row['ratio']:.2f}" if "ratio" in row else "-", f"{row['floor_cpu_s']:.0f}"]
        numbers += [f"{row['over_floor']:.2f}"]
        kinds = [_kinds(row["spent"]), _kinds(row.get("floor_spent"))]
        same = ["-" if batch == 1 else _shares(row["same_as_alone"]), _shares(row.get("same_answers"), "random")]
        together = "one at a time" if batch == 1 else f"{batch} together"
        rows.append([row["model"], str(row["length"]), together, *numbers, *kinds, *same])
    return table(head, rows)


def _kinds(spent: dict[str, float] | None) -> str:
    return " / ".join(f"{seconds:.0f}" for seconds in spent.values()) if spent else "-"


def _shares(same: dict[str, str] | None, left_out: str | None = None) -> str:
    return ", ".join(f"{policy} {share}" for policy, share in (same or {}).items() if policy != left_out) or "-"


def cells_table(figures: dict[str, Any]) -> str:
    cell, start, store = figures["cell"], figures["start"], figures["store"]
    length, cells = figures["growth_with_length"], figures["growth_with_cells"]
    share = figures["statistics"]
    by_name = ", ".join(f"{name} {ratio:.2f}" for name, ratio in share["ratio"].items())
    rows = [
        [
            f"time to prefill {share['length']} tokens with statistics, divided by the time without ({share['model']}, "
            f"{share['computed_by']})",
            by_name,
        ],
        [
            f"time of a cell divided by its floor ({cell['model']}, {cell['length']} tokens, "
            f"{cell['examples']} examples, {cell['policy']} {cell['budget']}; same answers {cell['same_answers']})",
            f"{cell['ratio']:.2f}: {seconds(cell['cell'])} s / {seconds(cell['floor'])} s",
        ],
        [
            "start of a cell's process divided by importing torch and loading the model",
            f"{start['ratio']:.2f}: {seconds(start['cell'])} s / {seconds(start['import'])} s",
        ],
        [
            f"growth with the prompt's length, {length['rows'][0]['length']} to {length['rows'][-1]['length']} tokens "
            f"({length['model']}), exponents",
            f"prefill {length['prefill_exponent']:.2f}, cell {length['cell_exponent']:.2f}",
        ],
        [
            f"planning {cells['planned_cells'][0]} to {cells['planned_cells'][-1]} cells",
            f"{cells['planning_s'][0]:.3g} to {cells['planning_s'][-1]:.3g} s, "
            f"exponent {cells['planning_exponent']:.2f}",
        ],
        [
            f"running {cells['run_cells'][0]} to {cells['run_cells'][-1]} cells",
            f"{cells['s_per_cell']:.3g} s per cell, exponent {cells['running_exponent']:.2f}",
        ],
        [
            "a stored prefill",
            f"{store['bytes_per_example'] / 1e6:.1f} MB per example, {store['over_kv_bytes']:.3f} times the bytes of "
            f"its keys and values; loaded at {store['load_mb_per_cpu_s']} MB/s, the file alone at "
            f"{store['file_mb_per_cpu_s']} MB/s",
        ],
    ]
    return table(["quantity", "measured"], rows)


def statistics_table(figures: dict[str, Any]) -> str:
    """Return seconds and MiB of one layer by length: attention alone, the whole matrix, and both statistics exactly."""
    found: dict[tuple[str, int], dict[str, str]] = {}
    kinds: list[str] = []
    for row in figures["rows"]:
        if row["what"] != "both" or row["q"] != row["n"]:
            continue
        heads, kv_heads, d, dtype = row["shape"]
        layer = f"{heads}/{kv_heads} heads, d = {d}, {dtype}, {row['device']}"
        kinds += [row["kind"]] if row["kind"] not in kinds else []
        found.setdefault((layer, row["n"]), {})[row["kind"]] = f"{row['seconds']:.3g} / {row['mib']:.0f}"
    rows = [[layer, str(n), *(cells.get(kind, "-") for kind in kinds)] for (layer, n), cells in found.items()]
    return table(["layer", "tokens", *(f"{kind}, s / MiB" for kind in kinds)], rows)


def serving_table(figures: dict[str, Any]) -> str:
    """Return the table of the grids with cell jobs and the server, and of the full cache with all three."""
    head = ["grid", "cells", "same answers", "cell jobs, CPU s / wall s", "serve, CPU s / wall s", "ratio, CPU / wall"]
    grids = [
        [
            row["grid"],
            str(row["cells"]),
            f"{row['same_answers']}/{row['answers']}",
            *(f"{row[f'{side}_cpu_s']:.0f} / {row[f'{side}_wall_s']:.0f}" for side in ("cells", "serve")),
            f"{row['cpu_ratio']:.2f} / {row['wall_ratio']:.2f}",
        ]
        for row in figures["grids"]
    ]
    full = [
        [
            row["engine"],
            f"{row['same_answers']}/{row['answers']}",
            f"{row['cpu_s']:.1f} / {row['wall_s']:.1f}",
            "-" if row["s_per_request"] is None else f"{row['s_per_request']:.2f}",
        ]
        for row in figures["full"]
    ]
    about = figures["full_is"]
    return (
        f"{table(head, grids)}\n\nThe full cache, {about['model']}, {about['length']} tokens, "
        f"{about['max_new_tokens']} new tokens:\n\n"
        + table(["engine", "same answers", "total, CPU s / wall s", "one request, s"], full)
    )


def batching_table(figures: dict[str, Any]) -> str:
    """Return answered tokens per second, one request at a time and several at once."""
    n = figures["at_once"]
    head = ["requests", "same answers", "one at a time, tokens per CPU s / wall s", f"{n} at once", "ratio, CPU / wall"]
    rows = [
        [
            row["requests"],
            f"{row['same_answers']}/{row['answers']}",
            *(
                f"{row[f'{how}_tokens_per_cpu_s']:.1f} / {row[f'{how}_tokens_per_s']:.1f}"
                for how in ("alone", "together")
            ),
            f"{row['cpu_ratio']:.2f} / {row['wall_ratio']:.2f}",
        ]
        for row in figures["rows"]
    ]
    about = f"{figures['model']}, prompts of {figures['length']} tokens, answers of {figures['max_tokens']}"
    return f"{about}, medians of {figures['rounds']} rounds:\n\n{table(head, rows)}"


TABLES = {
    "grid": grid_table,
    "cells": cells_table,
    "statistics": statistics_table,
    "serving": serving_table,
    "batching": batching_table,
}


def conditions_line(facts: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {facts['package_versions'][name]}" for name in ("torch", "transformers"))
    return (
        f"Measured on {facts['date']}, {facts['host']}, Python {facts['python']}, {versions}, "
        f"commit {facts['git_commit']}."
    )


def render(results: dict[str, Any], page: Path = PAGE) -> None:
    """Write the tables of the measured parts into the page."""
    for part, draw in TABLES.items():
        if part in results:
            put(page, part, f"{draw(results[part]['figures'])}\n\n{conditions_line(results[part]['conditions'])}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small sizes, to try it out; nothing is kept")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="run these parts")
    parser.add_argument("--render", type=Path, help="write the tables of this file and run nothing")
    arguments = parser.parse_args()
    if arguments.render:
        render(json.loads(arguments.render.read_text()))
        return
    facts = conditions()
    path = RESULTS / f"{facts['date']}-{facts['host']}.json"
    results = json.loads(path.read_text()) if path.exists() and not arguments.quick else {}
    for part in arguments.only:
        print(f"== {part}", flush=True)
        figures = run_part(part, arguments.quick)
        if figures is None:
            continue
        results[part] = {"conditions": facts, "figures": figures}
        if not arguments.quick:
            write_json(path, results)
            render(results)


if __name__ == "__main__":
    main()
