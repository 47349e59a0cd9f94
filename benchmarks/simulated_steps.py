"""Decode steps with a constructed association of entropy and recall, for the benchmark of verdicts and for tests."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from kv_transition.studies.recall.observations import Steps

Draw = Callable[[np.random.Generator, int, int], Steps]


def _made(entropy: np.ndarray, recall: np.ndarray, length: np.ndarray, kind: np.ndarray, cuts: np.ndarray) -> Steps:
    """From arrays [examples, steps]; ``length`` at the first step and ``kind`` [examples]; ``cuts``: steps of each."""
    n, steps = entropy.shape
    step = np.broadcast_to(np.arange(steps, dtype=float), (n, steps))
    kept = step < cuts[:, None]
    example = np.broadcast_to(np.arange(n)[:, None], (n, steps))[kept]
    return Steps(
        [f"e{i:03d}" for i in range(n)], example, entropy[kept], np.clip(recall, 0, 1)[kept], step[kept],
        (length[:, None] + step)[kept], kind[example], ["a", "b", "c"],
    )  # fmt: skip


def _base(rng: np.random.Generator, n: int, steps: int) -> tuple[np.ndarray, ...]:
    """Entropy with a drift within examples, noise of recall with a level of its own for each example, length, kind."""
    entropy = rng.gamma(1.3, 1.3, (n, 1)) * 0.5 + rng.gamma(0.7, 1.7, (n, steps))
    noise = rng.normal(0, 0.06, (n, 1)) + rng.normal(0, 0.1, (n, steps))
    length = rng.choice([256, 512, 1024, 2048, 4096], n) * rng.uniform(0.9, 1.1, n)
    return entropy, noise, length, rng.integers(0, 3, n), rng.integers(max(1, steps // 2), steps + 1, n)


def driven(rng: np.random.Generator, n: int, steps: int) -> Steps:
    """Return steps in which entropy determines recall: about 0.92 at low entropy, 0.3 at high entropy."""
    entropy, noise, *rest = _base(rng, n, steps)
    return _made(entropy, 0.95 - 0.72 / (1 + np.exp(-4 * (entropy - 1.75))) + noise, *rest)


def unrelated(rng: np.random.Generator, n: int, steps: int) -> Steps:
    """Return steps without an association; the level of recall differs between examples."""
    entropy, noise, *rest = _base(rng, n, steps)
    return _made(entropy, 0.62 + 1.5 * noise, *rest)


def by_length(rng: np.random.Generator, n: int, steps: int) -> Steps:
    """Return steps in which both depend only on the length; without controls the criteria are met."""
    _, noise, length, kind, cuts = _base(rng, n, steps)
    share = (np.log2(length) - 8) / 4
    entropy = 0.15 + 3.1 * share[:, None] + rng.gamma(0.5, 0.5, (n, 1)) + rng.gamma(0.5, 0.6, (n, steps)) - 0.2
    recall = np.where(share < 0.6, 0.95, 0.25)[:, None] + noise
    return _made(np.maximum(entropy, 0), recall, length, kind, cuts)


def by_kind(rng: np.random.Generator, n: int, steps: int) -> Steps:
    """Return steps in which both depend only on the kind of prompt."""
    _, noise, length, _, cuts = _base(rng, n, steps)
    kind = np.arange(n) % 3
    entropy = np.array([0.1, 1.4, 3.2])[kind, None] + rng.gamma(0.6, 0.5, (n, steps)) + rng.gamma(0.5, 0.4, (n, 1))
    return _made(entropy, np.array([0.95, 0.7, 0.25])[kind, None] + noise, length, kind, cuts)


def by_step(rng: np.random.Generator, n: int, steps: int) -> Steps:
    """Return steps in which both depend only on the step."""
    _, noise, length, kind, _ = _base(rng, n, steps)
    share = np.linspace(0, 1, steps)
    entropy = 3.6 * share**1.5 + rng.gamma(0.6, 0.4, (n, steps))
    recall = 0.96 - 0.78 / (1 + np.exp(-9 * (share - 0.55))) + noise
    return _made(entropy, recall, length, kind, np.full(n, steps))


def weak(rng: np.random.Generator, n: int, steps: int) -> Steps:
    """Return steps with a downward trend that meets neither criterion: recall falls from about 0.75 to 0.6."""
    entropy, noise, *rest = _base(rng, n, steps)
    return _made(entropy, 0.78 - 0.05 * np.minimum(entropy, 4) + noise, *rest)


def borderline(rng: np.random.Generator, n: int, steps: int) -> Steps:
    """Return steps with recall exactly 0.8 at low entropy and 0.5 at high entropy, so that nothing can be confirmed."""
    entropy, noise, *rest = _base(rng, n, steps)
    level = (entropy >= 1).astype(int) + (entropy > 2.5)
    return _made(entropy, np.array([0.8, 0.65, 0.5])[level] + noise, *rest)
