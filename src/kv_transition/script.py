"""Exit statuses of jobs, and calls of functions with the inputs, outputs and params of a rule."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from inspect import Parameter, signature
from pathlib import Path
from typing import Any

from kv_transition.errors import UserError
from kv_transition.provenance import unwritable


def status(work: Callable[..., None], *arguments: object) -> int:
    """Return the exit status of a job: 0, or 2 after one sentence about bad input. A bug keeps its traceback."""
    try:
        work(*arguments)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    except OSError as error:
        sentence = unwritable(Path(error.filename or "."), error)
        if sentence is None:
            raise
        print(sentence, file=sys.stderr)
        return 2
    return 0


def call(function: str, inputs: Mapping[str, Any], outputs: Mapping[str, Any], params: Mapping[str, Any]) -> None:
    """Call ``module:name`` with the named inputs, outputs and params of a rule as its arguments.

    An argument ``x`` fills the parameter ``x``, ``x_path`` or ``x_paths``. Outputs that fill none of them are passed
    together as the parameter ``outputs``, a dict by name. Inputs that a rule only waits for are named ``needs`` and are
    not passed.
    """
    module, _, name = function.partition(":")
    work = getattr(import_module(module), name)
    parameters = signature(work).parameters
    takes_any = any(p.kind is Parameter.VAR_KEYWORD for p in parameters.values())
    found: dict[str, Any] = {}
    figures: dict[str, str] = {}
    for given, is_output in ((inputs, False), (params, False), (outputs, True)):
        for key, value in given.items():
            fills = next((p for p in (key, f"{key}_path", f"{key}_paths") if p in parameters), None)
            if key in ("needs", "function", "code", "templates"):
                continue
            if is_output and fills is None:
                figures[key] = str(value)
            elif fills or takes_any:
                found[fills or key] = value
            else:
                raise TypeError(f"{function} has no parameter for {key}")
    if "outputs" in parameters:
        found["outputs"] = figures
    elif figures:
        raise TypeError(f"{function} has no parameter for {', '.join(figures)}")
    try:
        work(**found)
    except OSError as error:
        if sentence := unwritable(Path(error.filename or "."), error):
            raise UserError(sentence) from None
        raise
