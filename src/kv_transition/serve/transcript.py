"""The text of an answer while its tokens are decoded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_UNFINISHED = "\ufffd"
"""the text that a tokenizer returns for the first bytes of a character"""


class Transcript:
    """Converts tokens to text while they are decoded, and detects stop sequences.

    Text that may be the start of a character or of a stop sequence is held back. At the end, the text is the
    tokenizer's text of all tokens, cut before the first stop sequence.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str] = ()):
        self._tokenizer, self._stops = tokenizer, stops
        self._said = ""
        self.stopped = False
        self.text = ""

    def hear(self, tokens: Sequence[int]) -> str:
        """Return the text that can be sent now. tokens: all tokens of the answer so far."""
        self.text = self._tokenizer.decode(tokens, skip_special_tokens=True)
        found = [at for stop in self._stops if (at := self.text.find(stop)) >= 0]
        if found:
            self.stopped = True
            self.text = self.text[: min(found)]
        sayable = self.text if self.stopped else self._without_open_end()
        return self._say(sayable)

    def rest(self) -> str:
        """Return the text that was held back; called at the end of the answer."""
        return self._say(self.text)

    def _without_open_end(self) -> str:
        text = self.text
        if text.endswith(_UNFINISHED):
            return self._said
        ends = ((n, stop) for stop in self._stops for n in range(1, min(len(stop) - 1, len(text)) + 1))
        longest = max((n for n, stop in ends if text.endswith(stop[:n])), default=0)
        return text[: len(text) - longest]

    def _say(self, text: str) -> str:
        if not text.startswith(self._said):  # a tokenizer may change spaces of text that it returned before
            return ""
        new, self._said = text[len(self._said) :], text
        return new
