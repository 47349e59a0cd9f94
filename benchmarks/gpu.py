"""The engine on a GPU, with the geometry of a 7B model: random weights, bf16, 28 layers, 28 query and 4 KV heads.

    python benchmarks/gpu.py [--part prefill decode ...] [--skip-done] [--output FILE.json]
    python benchmarks/gpu.py --tiny --device cpu
    python benchmarks/gpu.py --render benchmarks/results/FILE.json

In eight minutes on an H200, most important first:

- tests: those that need a card.
- prefill: a prompt of 4k to 128k tokens read with all statistics, with each of them and with none, and in chunks,
  beside transformers' own forward pass on the same weights; peak memory.
- decode: tokens a second of 16k-token prompts by batch, budget, loop and policy.
- limit: the longest prompt that fits 40 GB beside the weights.
- kernels: column sums and entropies of one layer beside its attention and beside the card's matrix product.
- studies: an observed step, scored tokens, FlashAttention 2 and nf4 where they are installed.
- serve: answers a second through the scheduler of `kv_transition serve`, one request at a time and 8 at once.

Each part has a share of the time. What there is no time, memory or package for is said in its place. Each figure is
written as it is got, to ``benchmarks/results/{date}-{gpu}.json``; ``--skip-done`` measures what the file lacks.
``--render`` writes the GPU section of docs/benchmarks.md from a file. ``--tiny`` tries everything out with a small
model, without a limit of time, and writes nothing unless told where to. Needs torch, transformers, triton, safetensors,
pyarrow and pytest.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import time
from pathlib import Path
from typing import Any

import torch
from document import put, table
from gpu_bench import SEVEN_B, TINY, Bench, measured_before, model_of
from gpu_parts import PARTS, TARGET, TARGET_AT

from kv_transition.engines.local import LocalEngine
from kv_transition.provenance import git_commit, package_versions, write_json

HERE = Path(__file__).resolve().parent
PAGE = HERE.parent / "docs" / "benchmarks.md"
WHAT = ("what", "n", "at_once", "batch", "budget", "loop", "read")
"""keys that say which figure it is: the first columns"""


def number(value: Any, form: str = ".3g") -> str:
    return "" if value is None else format(value, form)


def tables(parts: dict[str, list[dict[str, Any]]]) -> str:
    """Return the measurements as Markdown tables."""
    pages = []
    for part, figures in parts.items():
        heads = list(dict.fromkeys(key for figure in figures for key in figure))
        heads.sort(key=lambda head: WHAT.index(head) if head in WHAT else len(WHAT))
        rows = [
            [
                f[h] if isinstance(f.get(h), str) else number(f.get(h), "d" if type(f.get(h)) is int else ".4g")
                for h in heads
            ]
            for f in figures
        ]
        pages.append(f"{part}\n\n{table(heads, rows)}")
    for figure in parts.get("prefill", []):
        if figure.get("n") == TARGET_AT and figure["read"] == "all" and "times_plain" in figure:
            met = "met" if figure["times_plain"] <= TARGET else "missed"
            pages.append(
                f"all statistics at 16k: {figure['times_plain']:.2f} x plain; at most {TARGET} is wanted: {met}"
            )
    return "\n\n".join(pages)


def render(results: dict[str, Any], page: Path = PAGE) -> None:
    """Write the GPU section of the page."""
    versions, hardware = results["versions"], results["hardware"]
    line = (
        f"Measured on {results['date']}, {hardware['device']}, Python {versions['python']}, torch {versions['torch']}, "
        f"transformers {versions['transformers']}, commit {results['git_commit']}."
    )
    figures = {part: results["figures"][part] for part in PARTS if part in results["figures"]}
    put(page, "gpu", f"{tables(figures)}\n\n{line}")


def conditions(engine: LocalEngine) -> dict[str, Any]:
    hardware: dict[str, Any] = {"device": engine.device_name, "machine": platform.machine()}
    if engine.device.type == "cuda":
        properties = torch.cuda.get_device_properties(engine.device)
        hardware |= {
            "memory_gib": properties.total_memory / 2**30,
            "compute_capability": f"{properties.major}.{properties.minor}",
            "cuda": torch.version.cuda,
        }
    return {
        "date": datetime.date.today().isoformat(),
        "hardware": hardware,
        "versions": package_versions() | {"python": platform.python_version(), "torch": torch.__version__},
        "git_commit": git_commit(),
        "attention": engine.attention,
        "attention_statistics": engine.statistics_by,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS), help="what to measure")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--tiny", action="store_true", help="a small model and short prompts: to try it out")
    parser.add_argument("--skip-done", action="store_true", help="take over the figures that the file has")
    parser.add_argument(
        "--output", type=Path, help="file for the figures; default: benchmarks/results/{date}-{gpu}.json"
    )
    parser.add_argument("--render", type=Path, help="write the section of this file and run nothing")
    parser.add_argument("--page", type=Path, default=PAGE, help="page that has the section")
    arguments = parser.parse_args()
    if arguments.render:
        render(json.loads(arguments.render.read_text(encoding="utf-8")), arguments.page)
        return
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA device; --device cpu --tiny tries the script out")

    ends = time.monotonic()
    sizes = TINY if arguments.tiny else SEVEN_B
    engine = LocalEngine(model_of(sizes, arguments.device))
    known = conditions(engine)
    path = arguments.output
    if path is None and not arguments.tiny:
        name = "".join(c if c.isalnum() else "-" for c in engine.device_name.lower())
        path = HERE / "results" / f"{known['date']}-{name}.json"
    figures = json.loads(path.read_text())["figures"] if path is not None and path.is_file() else {}

    measured: dict[str, list[dict[str, Any]]] = {}
    for part in arguments.part:
        measure, seconds = PARTS[part]
        ends += 3600 if arguments.tiny else seconds

        def keep(found: list[dict[str, Any]], part: str = part) -> None:
            measured[part] = found
            if path is not None:
                write_json(path, known | {"figures": figures | measured})

        before = measured_before(figures.get(part, [])) if arguments.skip_done else []
        bench = Bench(engine, sizes, ends=ends, done=before, kept=keep)
        try:
            measure(bench)
        except (torch.OutOfMemoryError, MemoryError) as error:
            bench.note({"skipped": f"out of memory: {str(error).splitlines()[0]}"})
        bench.clean()
    print(tables(measured))


if __name__ == "__main__":
    main()
