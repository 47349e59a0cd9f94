"""A context that several questions are asked about, compressed once per policy and budget."""

from __future__ import annotations

from typing import Any

from kv_transition.cache.store import Prefill
from kv_transition.run.decode import Compressed, Setting, compress
from kv_transition.run.prefill import Reader, key_of


class Contexts(Reader):
    """Reads prompts, and holds the compressed cache of the last context that several examples share."""

    _left: tuple[tuple[int, ...], Compressed] | None = None

    def compressed(self, example: dict[str, Any], prefill: Prefill, setting: Setting) -> Compressed | None:
        """Return the compressed cache of the context that is held; None if it cannot be shared by several questions.

        It cannot be shared after the prompt, which includes the question, under a policy that draws random numbers for
        each example, and if K depends on what follows the context.
        """
        alone = setting.mode != "before_question" or setting.policy.draws or setting.matches
        if alone or not self.holds(example):
            return None
        key = key_of(example)
        if self._left is None or self._left[0] != key:
            self._left = key, compress(self.engine, prefill.context, setting, seed=0)
        return self._left[1]
