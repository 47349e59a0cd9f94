"""Entropy recall: at steps with high token entropy, evicted entries can return to the cache."""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from kv_transition.cache.state import CacheState, LayerCache
from kv_transition.cache.tiers import TieredLayer, attention, exchange, offload, positions
from kv_transition.errors import UserError
from kv_transition.policies.base import BeforeAttention, Policy, top
from kv_transition.policies.h2o import H2O
from kv_transition.policies.h2o_heavy import H2OHeavy
from kv_transition.policies.streaming_llm import StreamingLLM
from kv_transition.policies.tova import TOVA

_INNER: dict[str, type[Policy]] = {"h2o": H2O, "h2o_heavy": H2OHeavy, "streaming_llm": StreamingLLM, "tova": TOVA}

SHARE_STEPS = 1000
"""steps among which a share of them is drawn"""


@dataclass(frozen=True)
class EntropyRecall(Policy):
    """Keeps the entries that ``inner`` evicts in host memory (cold entries). A step reads one token. Before a step that
    recalls, each layer selects its K entries again from hot and cold entries together: those with the most attention
    from the step's own query, computed over all of them, mean over the group (one set a layer if ``inner`` is tova).
    Before the other steps, and after each step, ``inner`` acts. In mode after_prompt the first step reads the last
    token of the prompt again; in mode before_question the question is read as one block, which is not a step.

    With moments entropy, a step recalls if H >= tau. H is the entropy (nats, temperature 1) of the distribution that
    the step's token was drawn from. For the first step it is the entropy after the prompt, computed with the full cache
    if the last token is read again. With tau 0 every step recalls. The other values of ``moments`` are controls: random
    and periodic recall as often as the policy ``like`` did on the same example, in its T steps, at random or evenly
    spaced steps among the first T steps, and as often again in each further T steps. With ``share``
    instead of ``like`` they recall in this share of all steps. always and never are the bounds.

    A budget counts the hot entries. The whole cache stays in memory, so results are compared with other policies only
    with the total bytes and the moved bytes beside them.

    Source: the study of recall and entropy.

    Cost: as ``inner``; in addition, a step that recalls computes the attention of one query to all N entries on the
    host, O(N d) time, and moves at most K entries of each KV head each way. Memory is that of the full cache. Answers
    are decoded one at a time.
    """

    statistics = frozenset({"attn_sum", "recent_queries"})
    acts_each_step = True
    one_at_a_time = True

    inner: Literal["h2o", "h2o_heavy", "streaming_llm", "tova"] = "h2o"
    """the policy that evicts, with its default hyper-parameters"""
    moments: Literal["entropy", "random", "periodic", "always", "never"] = "entropy"
    """what decides when to recall"""
    tau: Annotated[float | None, (0, None)] = None
    """moments entropy: least H in nats at which to recall; null: never"""
    tau_quantile: Annotated[float | None, (0, 1)] = None
    """instead of tau: tau becomes this quantile of H, measured on examples of the task that are in no bin"""
    like: str | None = None
    """moments random and periodic: name of the policy with moments entropy whose number of recalls is copied"""
    share: Annotated[float | None, (0, 1)] = None
    """instead of like: the share of steps that recall; for scored text, where there is no other answer to follow"""

    def protected(self, k: int) -> int:
        return self._policy.protected(k)

    def keep(self, k: int) -> int:
        return self._policy.keep(k)

    def score(self, layer: LayerCache, index: int, k: int, length: int, seed: int) -> Tensor:
        return self._policy.score(layer, index, k, length, seed)

    def compress_layer(
        self, layer: LayerCache, index: int, k: int, length: int, seed: int, keep_last: bool
    ) -> TieredLayer:
        """Return the layer compressed by ``inner``, with the evicted entries in host memory."""
        return offload(layer, self._policy.compress_layer(layer, index, k, length, seed, keep_last))

    def watch(self, seed: int, pace: tuple[int, int] | None = None) -> Watch:
        """Return an observer of the steps, as `Policy.watch`. Raises UserError if tau or the number of recalls is
        unknown.
        """
        if self.moments == "entropy" and self.tau is None and self.tau_quantile is not None:
            raise UserError(
                f"the policy entropy_recall has no tau for tau_quantile {self.tau_quantile}; run it in the "
                "workflow, which calibrates tau, or give tau itself"
            )
        if self.share is not None:
            pace = (round(self.share * SHARE_STEPS), SHARE_STEPS)
        if self.moments in ("random", "periodic") and pace is None:
            raise UserError(
                f"the policy entropy_recall with moments {self.moments} copies the number of recalls from another "
                "cell; run it in the workflow, and name that cell's policy in `like`, or give the share of steps"
            )
        return Watch(self, seed, pace or (0, 0))

    def recalled(self, layer: LayerCache, queries: Tensor, keys: Tensor) -> LayerCache:
        """Return the layer in which the entries with the most attention from the current token are hot; their number is
        unchanged.

        queries [*B, H, 1, d] and keys [*B, Hkv, 1, d] are the token's own, rotated.
        """
        if not isinstance(layer, TieredLayer):
            return layer
        score = attention(layer, queries, keys)
        if self.inner == "tova":  # all heads hold the same entries, at the same places
            score = score.mean(-2, keepdim=True).expand_as(score)
        # equal scores go to the lower position, hot or cold
        order = positions(layer).argsort(-1)
        best = top(score.gather(-1, order), layer.n)
        return exchange(layer, order.gather(-1, best))

    @property
    def _policy(self) -> Policy:
        return _INNER[self.inner]()


class Watch:
    """The steps of one answer under a policy that recalls: it decides before each step, and counts."""

    def __init__(self, policy: EntropyRecall, seed: int, pace: tuple[int, int]):
        """Set the policy; pace: (number of recalls, number of steps) of the answer that random and periodic moments
        copy.
        """
        self._policy, self._seed, self._pace = policy, seed, pace
        self._steps = 0
        self._moments: list[int] = []

    def before_attention(self, logits: Tensor) -> BeforeAttention | None:
        """Return what each layer does before the next step's attention; None: nothing.

        logits: [1, V] or [V] fp32, those that the step's token was drawn from.
        """
        step = self._steps
        self._steps += 1
        if not self._due(step, logits):
            return None
        self._moments.append(step)
        return self._policy.recalled

    def _due(self, step: int, logits: Tensor) -> bool:
        policy, (m, steps) = self._policy, self._pace
        match policy.moments:
            case "entropy":
                return policy.tau is not None and token_entropy(logits) >= policy.tau
            case "random":
                return steps > 0 and step % steps in random_moments(m, steps, self._seed, step // steps)
            case "periodic":
                return steps > 0 and (step + 1) * m // steps > step * m // steps
        return policy.moments == "always"

    def record(self, state: CacheState) -> dict[str, Any]:
        """Return facts to record about the answer that ends with ``state``.

        Moments are step numbers. Entries are counted per KV head. Bytes count keys and values of the evictable layers;
        moved bytes include evictions.
        """
        tiered = [layer for layer in state.layers if isinstance(layer, TieredLayer)]
        return {
            "tau": self._policy.tau,
            "steps": self._steps,
            "triggers": len(self._moments),
            "moments": self._moments,
            "moved_entries": sum(layer.moved for layer in tiered),
            "recalled_entries": sum(layer.recalled for layer in tiered),
            "moved_bytes": sum(layer.moved * layer.entry_nbytes for layer in tiered),
            "recalled_bytes": sum(layer.recalled * layer.entry_nbytes for layer in tiered),
            "hot_bytes": state.nbytes,
            "total_bytes": state.nbytes + sum(layer.cold_nbytes for layer in tiered),
        }


def token_entropy(logits: Tensor) -> float:
    """Return the entropy in nats of the next token's distribution at temperature 1, of logits [1, V] or [V]."""
    return max(0.0, float(torch.special.entr(logits.float().softmax(-1)).sum()))


@lru_cache(maxsize=16)  # asked for at each step of a block
def random_moments(m: int, steps: int, seed: int, block: int) -> frozenset[int]:
    """Return ``m`` random numbers below ``steps``, drawn independently for each ``block``."""
    return frozenset(random.Random(f"{seed} {block}").sample(range(steps), m))
