"""Four checks with the embedded model that the project works on this machine.

    python -m kv_transition.quickstart [--output FOLDER] [--model MODEL]

MODEL is another model on the CPU: a folder, a hub id or a GGUF file, such as the one that ``make real`` installs. The
checks load the model, create a cache, compress it and save the results, with the code that experiments run. Each
compares a result with the expected one; a check that fails ends the program with status 1. They take less than a minute
and need no network.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import polars as pl
import torch

from kv_transition import labels, specs
from kv_transition.budget import Budget
from kv_transition.cache.store import PrefillStore
from kv_transition.data import gguf
from kv_transition.engines import dequantize
from kv_transition.engines.local import LocalEngine
from kv_transition.errors import UserError
from kv_transition.paths import Paths
from kv_transition.provenance import rows_to_table, write_table
from kv_transition.run import job
from kv_transition.settings import Settings, parse
from kv_transition.stats.examples import FULL, Statistics
from kv_transition.studies.perplexity import run, windows
from kv_transition.studies.perplexity import specs as perplexity_specs
from kv_transition.studies.perplexity.analysis import perplexity, read_windows
from kv_transition.studies.perplexity.tables import PERPLEXITY

EXPERIMENT = {
    "experiment": "quickstart",
    "model": {"name": "resources/tiny-reader", "dtype": "float32", "device": "cpu"},
    "perplexity": {"corpus": "synthetic", "context_tokens": [512], "stride": 64, "books": 4, "windows_per_book": 2},
    "kv": {
        "policies": {"full": {}, "entropy_merge": {}, "entropy_drop": {}, "h2o": {}, "streaming_llm": {}},
        "budgets": [0.2],
    },
}
TOLERANCE = 1e-5  # nats per token, between two ways to compute the same value in float32
Facts = Iterator[str]


class CheckError(Exception):
    """A check failed."""


@dataclass
class Found:
    """The results that one check passes to the next."""

    settings: Settings
    files: Paths
    engine: LocalEngine | None = None
    windows: list[dict[str, Any]] = field(default_factory=list)
    plain: float = math.nan
    """negative log-likelihood of all scored tokens by a forward pass without a cache, in nats"""


def require(holds: bool, what: str) -> None:
    if not holds:
        raise CheckError(what)


def model_loaded(found: Found) -> Facts:
    spec = specs.prefill(found.settings)["model"]
    found.engine = job.load_engine(spec, threads=torch.get_num_threads())
    model = found.engine.model
    count, config = sum(p.numel() for p in model.parameters()), model.config
    require(count > 0, "the model has no parameters")
    yield (
        f"{spec['name']}: {config.model_type}, {count:,} parameters, {config.num_hidden_layers} layers, "
        f"{config.num_attention_heads} heads over {config.num_key_value_heads} KV heads"
    )


def cache_made(found: Found) -> Facts:
    path = found.files.windows(found.settings.perplexity.corpus, 0)
    windows.write(perplexity_specs.windows(found.settings), [path])
    found.windows = job.read_bin(path)
    first = found.windows[0]["context_ids"]
    state = found.engine.extend(None, first)
    keys, values = state.layers[0].keys, state.layers[0].values
    n, size = len(first), keys.element_size()
    expected = 2 * len(state.layers) * keys.shape[-3] * n * keys.shape[-1] * size
    require(keys.shape == values.shape and keys.shape[-2] == n, f"{n} tokens gave keys of shape {tuple(keys.shape)}")
    require(state.nbytes == expected, f"the cache has {state.nbytes} bytes and should have {expected}")
    yield (
        f"{n} tokens: keys and values {list(keys.shape)} in each of {len(state.layers)} layers, {state.nbytes:,} bytes "
        f"({state.nbytes // n:,} per token)"
    )
    found.plain = _plain(found)
    require(math.isfinite(found.plain), "a token has no finite probability")
    tokens = n + len(found.windows[0]["target_ids"])
    yield f"{len(found.windows)} windows of {tokens} tokens, perplexity {_exp(found.plain, found):.3f} without a cache"


@torch.inference_mode()
def _plain(found: Found) -> float:
    """Return the negative log-likelihood of all scored tokens in nats, by one forward pass per window."""
    from transformers import AutoModelForCausalLM

    name = found.settings.model.name
    if gguf.is_gguf(name):
        name = str(dequantize.model_folder(name, "float32"))
    model = AutoModelForCausalLM.from_pretrained(
        name, attn_implementation="eager", dtype=torch.float32, trust_remote_code=False, use_safetensors=True
    ).eval()
    nats = []
    for window in found.windows:
        ids = torch.tensor([window["context_ids"] + window["target_ids"]])
        scored = len(window["target_ids"]) - 1
        logits = model(input_ids=ids, use_cache=False).logits[0, -scored - 1 : -1].double()
        nats.append(float(torch.nn.functional.cross_entropy(logits, ids[0, -scored:], reduction="sum")))
    return math.fsum(nats)


def _exp(nats: float, found: Found) -> float:
    return math.exp(nats / (len(found.windows) * found.settings.perplexity.stride))


def strategies_applied(found: Found) -> Facts:
    settings, store = found.settings, PrefillStore(Path(found.files.prefill_store), "never", 1.0, {})
    corpus, context = settings.perplexity.corpus, settings.perplexity.context_tokens[0]
    for policy, budget in perplexity_specs.cells(settings):
        spec = perplexity_specs.cell(settings, policy, budget)
        rows = run.rows(found.engine, found.windows, spec, store)
        failed = [row["error"] for row in rows if row.get("nll_sum") is None]
        require(not failed, f"{policy}: {failed[0] if failed else ''}")
        nats, kept = math.fsum(r["nll_sum"] for r in rows), Budget.parse(budget).kept(context)
        for row in rows:
            share = row["bytes_after"] / row["bytes_before"]
            require(
                share == kept / context, f"{policy} keeps {share:.4f} of the bytes, not {kept} of {context} entries"
            )
        if policy == FULL["policy"]:
            off = abs(nats - found.plain) / (len(rows) * settings.perplexity.stride)
            require(
                off < TOLERANCE,
                f"the full cache differs by {off:.2g} nats per token from a forward pass without a cache",
            )
        path = found.files.perplexity(corpus, policy, budget, 0)
        write_table(path, rows_to_table(rows, PERPLEXITY), {"policy": policy, "model": settings.model.name})
        yield (
            f"{policy:14} {kept:4} of {context} entries, {rows[0]['bytes_after']:9,} bytes, "
            f"perplexity {_exp(nats, found):7.3f}"
        )


def results_saved(found: Found) -> Facts:
    corpus, settings = found.settings.perplexity.corpus, found.settings
    files = [found.files.perplexity(corpus, *key, 0) for key in perplexity_specs.cells(settings)]
    table = perplexity(read_windows(files), Statistics(**settings.statistics.model_dump()))
    path = found.files.table("perplexity")
    write_table(path, table, {"model": settings.model.name})
    read = pl.read_parquet(path)
    require(read.equals(pl.from_arrow(table)), f"{path} differs from the table that was written")
    for row in read.drop_nulls("bin").filter(pl.col("policy") != FULL["policy"]).iter_rows(named=True):
        ratio = labels.interval(row["ratio"], row["ratio_low"], row["ratio_high"], 3)
        yield f"{row['policy']:14} {ratio} times the full cache's perplexity (n = {row['n']})"
    yield f"written: {path}, and the windows in {Path(files[0]).parents[2]}"


CHECKS: dict[str, Callable[[Found], Facts]] = {
    "Model loaded": model_loaded,
    "Cache made": cache_made,
    "Strategies applied": strategies_applied,
    "Results saved": results_saved,
}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="results", help="the results are written to its sub-folder quickstart")
    parser.add_argument("--model", default=EXPERIMENT["model"]["name"], help="folder, hub id or GGUF file")
    arguments = parser.parse_args(argv)
    started = time.monotonic()
    experiment = EXPERIMENT | {"model": EXPERIMENT["model"] | {"name": arguments.model}}
    found = Found(parse(experiment), Paths(arguments.output, EXPERIMENT["experiment"]))
    log = Path(found.files.log("quickstart"))
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w", encoding="utf-8") as progress, redirect_stderr(progress):
        for name, check in CHECKS.items():
            facts = []
            try:
                facts.extend(check(found))
            except (CheckError, UserError) as error:
                print(f"✗ {name}: {error}")
                return 1
            print(f"✓ {name}", *(f"    {fact}" for fact in facts), sep="\n", flush=True)
    print(f"All four checks passed in {time.monotonic() - started:.0f} s.")
    if arguments.model == EXPERIMENT["model"]["name"]:
        print("The model is a test instrument: a ranking of the strategies on it does not hold for language models.")
        print("`make real` installs a language model of 135M parameters and runs an experiment on it.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
