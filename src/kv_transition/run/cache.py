"""A compressed cache on disk: prefill a text, compress it, save it, and continue from it later."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path

from kv_transition.budget import Budget
from kv_transition.cache import file
from kv_transition.cache.state import CacheState
from kv_transition.data.tokens import tokenizer_sha256
from kv_transition.engines.local import LocalEngine
from kv_transition.errors import UserError
from kv_transition.policies.catalog import create as create_policy
from kv_transition.run.decode import Answer, Setting, decode

_SAMPLE = 64
"""sample size of each weight for the fingerprint of a model"""


@dataclass(frozen=True)
class Cache:
    """The cache of a text under a policy and a budget."""

    state: CacheState
    kind: str
    hyper_parameters: dict
    budget: Budget
    k: int
    """entries per KV head that a policy that acts each step continues to hold"""

    @property
    def setting(self) -> Setting:
        return _setting(self.kind, self.hyper_parameters, self.budget)


def _setting(kind: str, hyper_parameters: dict, budget: Budget) -> Setting:
    return Setting(create_policy(kind, hyper_parameters), budget, "before_question")


def create(
    engine: LocalEngine, text: str, kind: str, hyper_parameters: dict, budget: Budget, *, seed: int = 0
) -> Cache:
    """Return the compressed cache of a text. kind, hyper_parameters: as `policies.catalog.resolve` returns them.

    Raises UserError if the text is empty.
    """
    if not text:
        raise UserError("the text is empty; give one with at least one token")
    tokens = engine.tokenizer(text, verbose=False).input_ids
    setting, k = _setting(kind, hyper_parameters, budget), budget.kept(len(tokens))
    state = engine.extend(None, tokens, setting.policy.statistics)
    return Cache(setting.compress(state, k, seed), kind, hyper_parameters, budget, k)


def save(engine: LocalEngine, cache: Cache, path: str | Path) -> None:
    """Write a cache with its policy and budget. Raises UserError if that fails."""
    made = {
        "kind": cache.kind,
        "hyper_parameters": json.dumps(cache.hyper_parameters),
        "budget": str(cache.budget),
        "k": str(cache.k),
    }
    file.save(cache.state, path, identity(engine) | made)


def load(engine: LocalEngine, path: str | Path) -> Cache:
    """Return the cache that `save` wrote. Raises UserError if it is damaged or was computed with another model."""
    state = file.load(path, engine.layer_devices, identity(engine))
    made = file.read_facts(path)
    try:
        return Cache(
            state, made["kind"], json.loads(made["hyper_parameters"]), Budget.parse(made["budget"]), int(made["k"])
        )
    except KeyError as error:
        raise UserError(f"{path} does not contain {error}; create it with `cache create`") from None


def continue_from(
    engine: LocalEngine, cache: Cache, text: str, max_new_tokens: int, *, temperature: float = 0.0, seed: int = 0
) -> tuple[str, Answer]:
    """Return what the model generates after reading more text on top of a cache. The cache is unchanged.

    Raises UserError if the text is empty.
    """
    if not text:
        raise UserError("the prompt is empty; give one with at least one token")
    tokens = engine.tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    setting = replace(cache.setting, temperature=temperature)
    answer = Answer(seed, max_new_tokens, budget_entries=cache.k)
    room = setting.room(max_new_tokens)
    state = setting.hold(engine.extend(cache.state, tokens, setting.while_decoding, room), cache.k)
    ((_, state),) = decode(engine, [state], setting, [answer])
    answer.cache_bytes, answer.total_bytes = state.nbytes, state.total_nbytes
    return engine.tokenizer.decode(answer.tokens, skip_special_tokens=True), answer


def identity(engine: LocalEngine) -> dict[str, str]:
    """Return what another process must have in common to continue from a cache: dtype, tokenizer and weights."""
    weights = hashlib.sha256()
    for name, weight in engine.model.named_parameters():
        flat = weight.detach().flatten()
        sample = flat[:: max(1, len(flat) // _SAMPLE)].float().cpu()
        weights.update(f"{name} {tuple(weight.shape)} {sample.tolist()}".encode())
    return {
        "dtype": str(engine.model.dtype).removeprefix("torch."),
        "tokenizer": tokenizer_sha256(engine.tokenizer)[:16],
        "model": weights.hexdigest()[:16],
    }
