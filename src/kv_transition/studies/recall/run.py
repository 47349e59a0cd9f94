"""The observation job: the entries that each policy would hold at each decode step of the full cache, and the entropy.

    python -m kv_transition.studies.recall.run --spec JSON --bin BIN.parquet --output STEPS.parquet
        --layers LAYERS.parquet

Nothing is evicted: the full cache decodes greedily from the prefill after the prompt. Before each token is read, every
policy predicts under every budget which entries it would hold (see `shadow`). The token's attention then shows which
entries the step needed.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kv_transition.budget import Budget
from kv_transition.cache.state import CacheState
from kv_transition.engines.local import LocalEngine
from kv_transition.errors import UserError
from kv_transition.policies.catalog import create
from kv_transition.provenance import digest, write_table
from kv_transition.run import job
from kv_transition.run.prefill import Reader, by_context, store_of
from kv_transition.studies.recall.ranking import Ranking, Scores, as_rows
from kv_transition.studies.recall.shadow import ORACLE, Oracle, Sets, Shadow, shadow, thinned
from kv_transition.studies.recall.tables import OBSERVATION_LAYERS, OBSERVATIONS
from kv_transition.tables import cluster_of

if TYPE_CHECKING:
    import pyarrow as pa

REASONING = " Let us reason step by step, one fact at a time:\n"
"""Text that is read after the prompt as the beginning of the answer, as in Kojima et al. (2022), arXiv 2205.11916"""

CONTINUATION = "continuation"
"""kind of prompt: the context alone, with no question after it"""

_SEED_BITS = 40
"""bits of a seed, as in the cells"""

Key = tuple[str, str, str, str]
"""policy, budget, granularity, memory"""


@dataclass
class Trace:
    """One decoded sequence of T steps under B keys."""

    keys: list[Key] = field(default_factory=list)
    token_id: list[int] = field(default_factory=list)
    entropy: list[float] = field(default_factory=list)
    n: list[int] = field(default_factory=list)
    k: list[list[int]] = field(default_factory=list)
    """number of entries that may be held, [T, B] like the fields below"""
    recall: list[list[float]] = field(default_factory=list)
    gold_mass_kept: list[list[float]] = field(default_factory=list)
    gold_new: list[list[float | None]] = field(default_factory=list)
    entropy_gap: list[list[float | None]] = field(default_factory=list)
    entropy_gap_gold: list[list[float | None]] = field(default_factory=list)
    finish_reason: str = "length"
    layer_keys: list[Key] = field(default_factory=list)
    """the keys with granularity per_head"""
    layer_sums: Tensor = field(default_factory=lambda: torch.zeros(2, 0, 0, dtype=torch.float64))
    """[2, b, L], sums over the steps of recall and gold_mass_kept of these keys in each evictable layer"""


@torch.inference_mode()
def follow(
    engine: LocalEngine, state: CacheState, shadows: Sequence[Shadow], max_tokens: int, entropy_gap_every: int = 0
) -> Trace:
    """Decode greedily from a full state and compare, at each step, the needed entries with the held ones.

    Step t reads the token that the previous logits produced; the entropy of these logits is the entropy of the step.
    Gold entries are the K entries, of the n before the token, with the highest attention. The end token is not read.
    shadows: must be new. entropy_gap_every: both entropy gaps are measured at every such step; 0: never.
    """
    prompt = Scores(state)
    for each in shadows:
        each.begin(prompt)
    del prompt  # its scores are not needed any more
    granularities = {g for each in shadows for g in each.granularities}
    trace = Trace()
    statistics = frozenset({"attn_sum"}).union(*(s.policy.statistics for s in shadows if s.policy.acts_each_step))
    golds: dict[tuple[str, str], Tensor] = {}
    for step in range(max_tokens):
        token = int(state.logits.argmax(-1))
        if token in engine.eos:
            trace.finish_reason = "stop"
            break
        scores = Scores(state)
        predictions = [each.predict(scores) for each in shadows]
        attention: list[Tensor] = []
        after = engine.extend(state, [token], statistics, max_tokens - step, attention)
        # the sets do not include the token's own entry
        attention = [row[:, : state.length] for row in attention]
        needed = {g: Ranking(as_rows(attention, g)) for g in granularities}
        heads = [len(row) for row in attention]
        for each, sets in zip(shadows, predictions, strict=True):
            if isinstance(each, Oracle):
                sets |= each.hindsight(needed, heads)
        altered = _Altered(engine, state, token, after.logits) if _due(step, entropy_gap_every) else None
        trace.token_id.append(token)
        trace.entropy.append(entropy(state.logits))
        trace.n.append(state.length)
        golds = _compare(trace, shadows, predictions, needed, heads, golds, altered)
        state = after
    return trace


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def entropy(logits: Tensor) -> float:
    """Return -sum p log p in nats of the softmax of logits [V], temperature 1, fp32."""
    return float(torch.special.entr(logits.float().softmax(-1)).sum())


@dataclass
class _Altered:
    """The change of a step's next-token distribution if the step attends to fewer entries."""

    engine: LocalEngine
    state: CacheState
    token: int
    logits: Tensor
    """[V], of the step with all entries"""

    _known: dict[int, float] = field(default_factory=dict)

    def divergence(self, mask: Tensor) -> float:
        """Return the KL divergence, in nats, of the distribution with only the entries of a mask [R, n]."""
        # both memories may have the same set, so divergences are cached by mask
        if id(mask) not in self._known:
            self._known[id(mask)] = self._divergence(mask)
        return self._known[id(mask)]

    def without(self, mask: Tensor) -> float:
        """Return the KL divergence of the distribution without the entries of a mask."""
        return self._divergence(~mask)

    def _divergence(self, mask: Tensor) -> float:
        less = self.engine.extend(thinned(self.state, mask), [self.token], frozenset())
        whole, partial = (logits.double().log_softmax(-1) for logits in (self.logits, less.logits))
        return float((whole.exp() * (whole - partial)).sum())


def _compare(
    trace: Trace,
    shadows: Sequence[Shadow],
    predictions: Sequence[Sets],
    needed: dict[str, Ranking],
    heads: list[int],
    before: dict[tuple[str, str], Tensor],
    altered: _Altered | None,
) -> dict[tuple[str, str], Tensor]:
    """Add the sets of the last step to the trace; return its gold sets by granularity and budget.

    needed: the ranking by the step's attention at each granularity. before: gold sets of the previous step.
    """
    golds: dict[tuple[str, str], Tensor] = {}
    new: dict[tuple[str, str], float | None] = {}
    gaps: dict[tuple[str, str], float | None] = {}
    shares = {g: _shares(ranking.score) for g, ranking in needed.items()}
    measured: dict[int, tuple[Tensor, Tensor]] = {}
    columns: list[tuple[Key, int, tuple[str, str], Tensor]] = []
    for each, sets in zip(shadows, predictions, strict=True):
        k, budget = each.budget.kept(trace.n[-1]), str(each.budget)
        for (granularity, memory), mask in sets.items():
            at = granularity, budget
            if at not in golds:
                golds[at] = needed[granularity].best(k)
                new[at] = _share_new(golds[at], before.get(at), k)
                gaps[at] = altered.without(golds[at]) if altered else None
            # both memories may have the same set
            if id(mask) not in measured:
                measured[id(mask)] = _overlap(mask, golds[at]), _sum_of(shares[granularity], mask)
            columns.append(((each.name, budget, granularity, memory), k, at, mask))

    recall, mass = torch.empty(2, len(columns), dtype=torch.float64)
    for granularity in needed:
        chosen = [i for i, (_, _, at, _) in enumerate(columns) if at[0] == granularity]
        own = (measured[id(columns[i][3])] for i in chosen)
        hits, masses = (torch.stack(x).double().cpu() for x in zip(*own, strict=True))
        hits /= torch.tensor([columns[i][1] for i in chosen])[:, None]  # [b, R]
        recall[chosen], mass[chosen] = hits.mean(-1), masses.mean(-1)
        if granularity == "per_head":
            own = torch.stack([_of_layers(x, heads) for x in (hits, masses)])
            trace.layer_sums = trace.layer_sums + own if trace.layer_keys else own
            trace.layer_keys = [columns[i][0] for i in chosen]

    trace.keys = [key for key, *_ in columns]
    trace.k.append([k for _, k, *_ in columns])
    trace.recall.append(recall.tolist())
    trace.gold_mass_kept.append(mass.tolist())
    trace.gold_new.append([new[at] for _, _, at, _ in columns])
    trace.entropy_gap_gold.append([gaps[at] for _, _, at, _ in columns])
    trace.entropy_gap.append([altered.divergence(mask) if altered else None for *_, mask in columns])
    return golds


def _overlap(mask: Tensor, other: Tensor) -> Tensor:
    """Return the number of common entries of each row of two masks [R, n]."""
    return (mask & other).sum(-1, dtype=torch.int32)


def _sum_of(shares: Tensor, mask: Tensor) -> Tensor:
    """Return the sum of the shares of the entries of each row of a mask [R, n]."""
    # torch uses vector instructions of a CPU to convert uint8, but not to convert bool
    return (shares * mask.view(torch.uint8)).sum(-1)


def _shares(attention: Tensor) -> Tensor:
    """Return the share of each entry in the attention on all entries before the token; rows [R, n]."""
    # the sum may be 0, if all attention is on the token itself
    return attention / attention.sum(-1, keepdim=True).clamp_min(torch.finfo(attention.dtype).tiny)


def _share_new(gold: Tensor, before: Tensor | None, k: int) -> float | None:
    """Return the share of the gold entries that were not gold at the previous step."""
    if before is None:
        return None
    again = (gold[:, : before.shape[-1]] & before).sum(-1)
    return 1 - float(again.double().mean()) / k


def _of_layers(x: Tensor, heads: list[int]) -> Tensor:
    """Return the mean over the KV heads of each layer, [b, R] -> [b, L]."""
    return torch.stack([part.mean(-1) for part in x.split(heads, -1)], -1)


def shadows_of(spec: dict[str, Any], seed: int) -> list[Shadow]:
    """Return a new shadow of each policy and budget of a spec."""
    found = []
    for name, options in spec["policies"].items():
        kind = options["kind"]
        policy = None if kind == ORACLE else create(kind, options["hyper_parameters"])
        for budget in map(Budget.parse, spec["budgets"]):
            each = shadow(name, kind, policy, budget, spec["granularities"], spec["memories"], seed)
            if each is not None:
                found.append(each)
    return found


def observed(
    engine: LocalEngine, examples: Sequence[dict[str, Any]], spec: dict[str, Any], store: Any
) -> Iterator[tuple[dict[str, Any], str, Trace]]:
    """Yield each example, the kind of its prompt and its trace; with continuations, also the context without a
    question.
    """
    statistics = frozenset({"attn_sum"}).union(*(s.policy.statistics for s in shadows_of(spec, 0)))
    reader = Reader(engine, store, examples)
    for number, example in enumerate(by_context(examples), 1):
        prefill, _ = reader.prefill(example, statistics)
        kind = str(json.loads(example["meta"] or "{}").get("kind") or example["task"])
        prompts = [(kind, prefill.prompt)]
        if spec["reasoning"]:
            begun = engine.tokenizer(REASONING, add_special_tokens=False, verbose=False).input_ids
            prompts = [(kind, engine.extend(prefill.prompt, begun, statistics))]
        if spec["continuations"]:
            prompts.append((CONTINUATION, prefill.context))
        most = example["max_new_tokens"] if spec["max_tokens"] == "task" else spec["max_tokens"]
        for prompt_kind, state in prompts:
            # the seed of the first repeat in the cells
            seed = int(digest([spec["seed"], example["example_id"], 0]), 16) % 2**_SEED_BITS
            yield example, prompt_kind, follow(engine, state, shadows_of(spec, seed), most, spec["entropy_gap_every"])
        print(f"observed {number} of {len(examples)} prompts", file=sys.stderr, flush=True)


def steps_table(example: dict[str, Any], prompt_kind: str, trace: Trace) -> pa.Table:
    """Return the T x B rows of OBSERVATIONS of a trace."""
    import numpy as np
    import pyarrow as pa

    steps, width = len(trace.n), len(trace.keys)

    def of_steps(values: list) -> Any:
        return np.repeat(np.array(values), width)

    def flat(values: list[list]) -> list:
        return [value for row in values for value in row]

    columns = {
        "task": [example["task"]] * (steps * width),
        "bin": [example["bin"]] * (steps * width),
        "example_id": [example["example_id"]] * (steps * width),
        "prompt_kind": [prompt_kind] * (steps * width),
        "cluster": [cluster_of(example)] * (steps * width),
        **{name: [key[i] for key in trace.keys] * steps for i, name in enumerate(_KEY)},
        "step": of_steps(range(steps)),
        "token_id": of_steps(trace.token_id),
        "entropy": of_steps(trace.entropy),
        "n": of_steps(trace.n),
        **{name: flat(getattr(trace, name)) for name in OBSERVATIONS.names if name in _OF_SETS},
    }
    return pa.table({name: columns[name] for name in OBSERVATIONS.names}, schema=OBSERVATIONS)


_KEY = ("policy", "budget", "granularity", "memory")
_OF_SETS = {"k", "recall", "gold_mass_kept", "gold_new", "entropy_gap", "entropy_gap_gold"}


def layers_table(example: dict[str, Any], prompt_kind: str, trace: Trace) -> pa.Table:
    """Return a row of OBSERVATION_LAYERS for each policy, budget, memory and evictable layer."""
    import pyarrow as pa

    rows = []
    steps = len(trace.n)
    of_example = {name: example[name] for name in ("task", "bin", "example_id")} | {"prompt_kind": prompt_kind}
    for (policy, budget, _, memory), recall, mass in zip(trace.layer_keys, *trace.layer_sums, strict=True):
        of_key = of_example | {"policy": policy, "budget": budget, "memory": memory, "steps": steps}
        for layer, (own_recall, own_mass) in enumerate(zip(recall.tolist(), mass.tolist(), strict=True)):
            rows.append(of_key | {"layer": layer, "recall": own_recall / steps, "gold_mass_kept": own_mass / steps})
    return pa.Table.from_pylist(rows, schema=OBSERVATION_LAYERS)


def main(argv: list[str] | None = None) -> None:
    import pyarrow as pa

    arguments = job.arguments(__doc__, argv, "--bin", "--output", "--layers")
    spec = arguments.spec
    examples = job.read_bin(arguments.bin)
    engine = job.load_engine(spec["model"], arguments.threads)
    store = store_of(spec["model"], spec["prefill_code"], arguments.bin)
    steps, layers, lengths = [OBSERVATIONS.empty_table()], [OBSERVATION_LAYERS.empty_table()], []
    try:
        for example, kind, trace in observed(engine, examples, spec, store):
            steps.append(steps_table(example, kind, trace))
            layers.append(layers_table(example, kind, trace))
            lengths.append([example["example_id"], kind, len(trace.n), trace.finish_reason])
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise UserError(
            "observe: a full cache and the observed sets do not fit into the memory; lower model.max_length or "
            "prefill.chunk_tokens, or give observe.granularities: [global]"
        ) from error
    facts = {
        "observe_hash": digest(spec),
        "vocab_size": engine.model.config.get_text_config().vocab_size,
        "policies": spec["policies"],
        "reasoning": spec["reasoning"],
        "sequences": lengths,
        **job.model_facts(spec["model"], engine),
        **job.bin_metadata(arguments.bin),
    }
    write_table(arguments.layers, pa.concat_tables(layers), facts)
    write_table(arguments.output, pa.concat_tables(steps), facts)


if __name__ == "__main__":
    job.run(main)
