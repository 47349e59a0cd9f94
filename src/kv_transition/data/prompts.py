"""Prompts in two segments, truncated and wrapped as in LongBench (Bai et al. 2024, arXiv 2308.14508).

The *context* segment ends with the context itself; the *question* segment is everything after it, including the
template's text between the two. Each segment is tokenized separately, so that a compressed context can be continued
with any question. A prompt that is too long loses its middle: the first and the last half of ``max_length`` tokens are
kept. It is wrapped in the chat template afterwards, so the tokens of the chat template are not counted in
``max_length``.
"""

from __future__ import annotations

import hashlib
import json
import string
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from kv_transition.data.tokens import TEMPLATE_DATE
from kv_transition.errors import UserError

if TYPE_CHECKING:
    from transformers import BatchEncoding, PreTrainedTokenizerFast

# Marks the end of the context while a chat template is rendered: private-use characters, which no text should contain.
_BOUNDARY = "\ue000\ue0ff\ue000"

Piece = tuple[str, str | None]
"""Literal text and the field ("context" or "input") that follows it."""


@dataclass(frozen=True)
class Template:
    """The text before and after context and question."""

    before: str
    after: tuple[Piece, ...]

    @classmethod
    def parse(cls, text: str, where: str) -> Template:
        """Return a template with ``{context}`` once and then any number of ``{input}``; ``{{`` is a literal brace.

        Raises:
            UserError: the template, which ``where`` names, has another form.
        """
        try:
            parts = [(literal, field) for literal, field, _, _ in string.Formatter().parse(text)]
        except ValueError as error:
            raise UserError(f"{where} is not a template ({error}); write a literal brace twice") from None
        fields = [field for _, field in parts if field is not None]
        unknown = set(fields) - {"context", "input"}
        if unknown:
            raise UserError(f"{where} has the field {{{min(unknown)}}}; only {{context}} and {{input}} are known")
        if fields.count("context") != 1 or fields[0] != "context":
            raise UserError(f"{where} must contain {{context}} once, before any {{input}}")
        at = [field for _, field in parts].index("context")
        after = tuple(parts[at + 1 :])
        if not after:
            raise UserError(f"{where} must have some text after {{context}}")
        return cls("".join(literal for literal, _ in parts[: at + 1]), after)

    @property
    def has_question(self) -> bool:
        return any(field == "input" for _, field in self.after)

    def fill(self, context: str, question: str) -> tuple[str, str]:
        """Return the texts of the two segments."""
        after = "".join(literal + (question if field else "") for literal, field in self.after)
        return self.before + context, after


@dataclass(frozen=True)
class Prompt:
    """A prompt as it is fed to a model.

    Attributes:
        context_text, question_text: the segments, chat template included; their tokens are the ids below.
        context_ids, question_ids: token ids.
        content: where the prompt without its chat template begins in context_text and ends in question_text; None if
            unknown.
        token_len: tokens of the prompt before truncation.
        truncated: whether the middle was removed.
        question_cut: whether truncation removed a part of the question segment.
    """

    context_text: str
    question_text: str
    context_ids: list[int]
    question_ids: list[int]
    content: tuple[int, int] | None
    token_len: int
    truncated: bool
    question_cut: bool

    @property
    def prompt_len(self) -> int:
        return len(self.context_ids) + len(self.question_ids)

    @property
    def sha256(self) -> str:
        """Return the hash of the token ids of both segments: equal prompts have equal hashes in every experiment."""
        return hashlib.sha256(json.dumps([self.context_ids, self.question_ids]).encode()).hexdigest()


@dataclass(frozen=True)
class PromptBuilder:
    """Builds prompts from contexts and questions.

    Attributes:
        tokenizer: the model's own fast tokenizer.
        template: the wording.
        max_length: maximum number of tokens of a prompt before truncation, special tokens included, without the chat
            template.
        chat: whether to wrap prompts in the tokenizer's chat template.
    """

    tokenizer: PreTrainedTokenizerFast
    template: Template
    max_length: int
    chat: bool

    def __call__(self, context: str, question: str) -> Prompt:
        whole = self.template.fill(context, question)
        fed = self._as_fed(*whole)
        token_len = len(fed[2]) + len(fed[3])
        cut = self.truncate(*whole)
        if cut is None:
            return Prompt(*fed, token_len, truncated=False, question_cut=False)
        *segments, question_cut = cut
        return Prompt(*self._as_fed(*segments), token_len, truncated=True, question_cut=question_cut)

    def plain_len(self, context: str, question: str) -> int:
        """Return the number of tokens before truncation, with special tokens and without a chat template."""
        before, after = self.template.fill(context, question)
        return len(self._encode(before, special=True).input_ids) + len(self._encode(after, special=False).input_ids)

    def truncate(self, context: str, question: str) -> tuple[str, str, bool] | None:
        """Return the segments of a prompt without its middle if it is longer than ``max_length`` tokens.

        The text is cut where tokens end, so that the kept text is unchanged and the boundary between the segments is
        preserved. Special tokens that occur literally in the text are removed, as decoding with skip_special_tokens
        does.

        Returns:
            The two segments and whether the question segment was cut; None if the prompt is short enough.
        """
        text, boundary = context + question, len(context)
        encoding = self._encode(text, special=True)
        n = len(encoding.input_ids)
        if n <= self.max_length:
            return None
        half = self.max_length // 2
        # Both cuts are at the end of a token: white space that belongs to no token is kept with the later token.
        head, tail = _token_end(encoding, half - 1), _token_end(encoding, n - half - 1)
        removed = [(head, tail)]
        for i, token in enumerate(encoding.input_ids):
            literal = self._special_tokens.get(token)
            span = encoding.token_to_chars(i) if literal else None
            # an unknown word has the id of a special token, but its text differs from that token's
            if span and text[span.start : span.end] == literal:
                removed.append((span.start, span.end))
        removed.sort()
        return (
            _without(text, removed, 0, boundary),
            _without(text, removed, boundary, len(text)),
            tail > boundary,
        )

    @cached_property
    def _special_tokens(self) -> dict[int, str]:
        return {i: token.content for i, token in self.tokenizer.added_tokens_decoder.items() if token.special}

    def _as_fed(self, context: str, question: str) -> tuple[str, str, list[int], list[int], tuple[int, int] | None]:
        content: tuple[int, int] | None = (0, len(question))
        if self.chat:
            plain = context, question
            context, question = render_chat(self.tokenizer, context, question)
            content = _content(*plain, context, question)
        # a chat template contains the special tokens itself
        context_ids = self._encode(context, special=not self.chat).input_ids
        return context, question, context_ids, self._encode(question, special=False).input_ids, content

    def _encode(self, text: str, special: bool) -> BatchEncoding:
        return self.tokenizer(text, add_special_tokens=special, verbose=False)


def render_chat(tokenizer: PreTrainedTokenizerFast, context: str, question: str) -> tuple[str, str]:
    """Return a prompt as one user message followed by the start of the answer, in two segments with the same boundary.

    Raises:
        UserError: the template fails, or does not render the message's text once and unchanged.
    """

    def render(text: str) -> str:
        messages = [{"role": "user", "content": text}]
        try:
            return tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True, date_string=TEMPLATE_DATE
            )
        except Exception as error:  # a template may raise any exception
            raise UserError(f"model.chat_template: the tokenizer's chat template fails: {error}") from None

    head, _, tail = render(context + _BOUNDARY + question).partition(_BOUNDARY)
    if head + tail != render(context + question):
        raise UserError("model.chat_template: the chat template changes the text of a message; set it to never")
    return head, tail


def _content(context: str, question: str, head: str, tail: str) -> tuple[int, int] | None:
    """Return where a message begins in the rendered ``head`` and ends in ``tail``; a template may strip the message."""
    for begin in (context, context.lstrip()):
        for end in (question, question.rstrip()):
            if head.endswith(begin) and tail.startswith(end):
                return len(head) - len(begin), len(end)
    return None


def _token_end(encoding: BatchEncoding, i: int) -> int:
    """Return the position in the text where token ``i`` ends; 0 for a special token before the text."""
    span = encoding.token_to_chars(i)
    return 0 if span is None else span.end


def _without(text: str, removed: Iterable[tuple[int, int]], start: int, end: int) -> str:
    """Return ``text[start:end]`` without the sorted ``removed`` ranges."""
    kept = []
    for low, high in removed:
        kept.append(text[start : min(low, end)])
        start = max(start, high)
    return "".join([*kept, text[start:end]])
