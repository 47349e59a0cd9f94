"""Check the options of a request before the request waits for the model."""

from __future__ import annotations

import importlib
import secrets
from collections.abc import Sequence
from http import HTTPStatus
from typing import Any

from kv_transition.budget import Budget
from kv_transition.engines.local import GREEDY_BELOW
from kv_transition.errors import UserError
from kv_transition.policies import catalog
from kv_transition.policies.base import Policy
from kv_transition.run.decode import Setting
from kv_transition.serve.refusal import RefusalError
from kv_transition.serve.schema import Request, Tokens
from kv_transition.serve.work import Asked

# Fields that would change the answer or its form, with the values that have no effect and are therefore accepted.
_ONLY: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "prompt_logprobs": (),
    "suffix": ("",),
    "top_p": (1,),
    "top_k": (0, -1),
    "min_p": (0,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "repetition_penalty": (1,),
    "logit_bias": ({},),
    "response_format": ({"type": "text"},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "audio": (),
    "modalities": (["text"],),
}


def asked(request: Request, files: Sequence[str] = ()) -> Asked:
    """Return the checked options of a request. files: policy files that requests may name, in addition to the built-in
    kinds.

    Raises RefusalError if an option or a value is not supported.
    """
    _refuse_unsupported(request.model_extra or {})
    kind, hyper_parameters = _kind(request.kv_policy, files)
    budget = _budget(request, kind, hyper_parameters)
    temperature = 1.0 if request.temperature is None else float(request.temperature)
    seed = request.seed if request.kv_seed is None else request.kv_seed
    if seed is None:
        seed = secrets.randbits(40) if temperature >= GREEDY_BELOW else 0
    pace = None if request.kv_pace is None else (request.kv_pace[0], request.kv_pace[1])
    if pace and pace[0] > pace[1]:
        raise _bad("kv_pace", f"an answer of {pace[1]} steps has no {pace[0]} moments; give [moments, steps]")
    try:
        setting = Setting(
            _policy(kind, hyper_parameters), budget, request.kv_mode, request.kv_first_token, temperature=temperature
        )
        setting.policy.watch(seed, pace)  # raises if the policy lacks what determines its moments
    except UserError as error:
        raise _bad("kv_policy", str(error)) from None
    if request.kv_mode == "before_question" and getattr(request, "kv_context", None) is None:
        raise _bad("kv_context", "give the end of the context, because it is compressed before the question is read")
    return Asked(kind, hyper_parameters, setting, seed, pace, request.stops, request.wanted_tokens)


def _refuse_unsupported(given: dict[str, Any]) -> None:
    for field, value in given.items():
        # true and 1 are equal in Python, but they are different values in JSON
        fine = any(
            value == allowed and isinstance(value, bool) == isinstance(allowed, bool)
            for allowed in _ONLY.get(field, ())
        )
        if field in _ONLY and value is not None and not fine:
            raise _bad(field, "this server does not support it; leave it out", code="unsupported_parameter")


def _kind(given: str | dict[str, Any], files: Sequence[str]) -> tuple[str, dict[str, Any]]:
    options = {"kind": given} if isinstance(given, str) else given
    kind = options.get("kind")
    # A policy file is executed when its policy is created, so only files given at the start of the server are allowed.
    offered = [*catalog.kinds(), *files]
    if not isinstance(kind, str) or not (kind in offered or catalog.is_press(kind)):
        raise _bad("kv_policy", f"there is no policy {kind!r}; choose one of {', '.join(offered)}")
    try:
        return catalog.resolve(kind, options)
    except UserError as error:
        raise _bad("kv_policy", str(error).removeprefix(f"kv.policies.{kind}").lstrip(".: ")) from None


def _policy(kind: str, hyper_parameters: dict[str, Any]) -> Policy:
    if catalog.is_press(kind):
        return importlib.import_module("kv_transition.run.press").Press(kind, hyper_parameters)
    return catalog.create(kind, hyper_parameters)


def _budget(request: Request, kind: str, hyper_parameters: dict[str, Any]) -> Budget:
    given = request.kv_budget
    if isinstance(given, Tokens):
        budget = Budget.of_tokens(given.tokens)
    else:
        try:
            budget = Budget.of_fraction(1 if given is None else given, "kv_budget")
        except UserError as error:
            raise _bad("kv_budget", str(error).removeprefix("kv_budget: ")) from None
    own = kind == "full" or catalog.ignores_budget(kind, hyper_parameters)
    if own and not budget.is_full:
        raise _bad("kv_budget", f"the hyper-parameters of {kind} determine what it keeps; leave it out")
    if not own and given is None:
        raise _bad("kv_budget", f"{kind} needs a budget: a fraction, or {{'tokens': n}}")
    return budget


def _bad(param: str, message: str, code: str | None = None) -> RefusalError:
    return RefusalError(HTTPStatus.BAD_REQUEST, f"{param}: {message}", param=param, code=code)
