"""What our adapter makes of presses, on the cases of compress.py and with the same output.

    PYTHONPATH=src .venv-kvpress/bin/python benchmarks/peers/adapter.py CASES.json OUT.safetensors

A case also has ``k``, the entries to keep. The message of a refused one stands in OUT's metadata under its name.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from kv_transition.engines import kvpress_press
from kv_transition.engines.local import LocalEngine
from kv_transition.errors import UserError


def policy(case: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Kind and hyper-parameters, as a configuration gives them."""
    outer, _, inner = case["press"].partition("(")
    if not inner:
        return f"kvpress.{outer}", case["arguments"]
    inner_arguments = {f"press.{key}": value for key, value in case["arguments"].items()}
    return f"kvpress.{outer}", {"press": inner.removesuffix(")")} | inner_arguments


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cases", type=Path)
    parser.add_argument("output", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    given = json.loads(arguments.cases.read_text())
    engines: dict[str, LocalEngine] = {}
    found, refused = {}, {}
    for name, case in given["cases"].items():
        folder = case["model"]
        if folder not in engines:
            engines[folder] = LocalEngine.from_pretrained(folder, device="cpu")
        engine = engines[folder]
        try:
            state = kvpress_press.read(engine, given["tokens"], *policy(case), case["k"])
        except UserError as error:
            refused[name] = str(error)
            continue
        kept = torch.zeros(len(state.layers), engine.model.config.num_key_value_heads, state.length, dtype=torch.bool)
        for rows, layer in zip(kept, state.layers, strict=True):
            places = [place for part in layer.parts for place in part.positions]
            for row, place in zip(rows, places, strict=True):
                row[place] = True
        found[f"{name}.kept"] = kept
        tokens, feed = [], case["question"]
        for _ in range(case["steps"]):
            state = engine.extend(state, feed, frozenset())
            feed = [int(state.logits.argmax())]
            tokens += feed
        found[f"{name}.tokens"] = torch.tensor(tokens)
    save_file(found, arguments.output, metadata=refused)


if __name__ == "__main__":
    main()
