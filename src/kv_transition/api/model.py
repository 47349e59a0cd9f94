"""A model that reads contexts, from a folder, the hub, or an object of the caller."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kv_transition.api.chosen import PolicyLike, policy_of
from kv_transition.cache.state import STATISTICS
from kv_transition.data.prompts import Template, render_chat
from kv_transition.engines import loading
from kv_transition.engines.guest import GuestEngine
from kv_transition.engines.local import LocalEngine
from kv_transition.errors import UserError

if TYPE_CHECKING:
    from kv_transition.api.context import Context

Text = str | Sequence[int]
"""a text, or its token ids, which are used unchanged"""


def load(
    model: Any,
    tokenizer: Any = None,
    *,
    template: str = "{context}{input}",
    chat: bool | None = None,
    revision: str | None = None,
    dtype: str = "float32",
    device: str = "auto",
    quantization: Mapping[str, Any] | None = None,
    device_map: str | None = None,
    attention: str = "auto",
    chunk_tokens: int | None = None,
) -> Model:
    """Return a model that reads contexts.

    model: a folder, a hub id, or a loaded transformers model (with its ``tokenizer``, unless only token ids are used),
    which works as before afterwards. template: the wording around context and question, with ``{context}`` and then
    ``{input}``. chat: wrap it in the tokenizer's chat template; None: if there is one. chunk_tokens: longest piece of a
    context read at a time. The other arguments determine how a folder or a hub id is loaded.

    Raises UserError if loading fails or if no layer of the model can be evicted.
    """
    if isinstance(model, str) or hasattr(model, "__fspath__"):
        from kv_transition.data.tokens import load_tokenizer

        name = str(model)
        tokenizer = load_tokenizer(name, revision) if tokenizer is None else tokenizer
        model = loading.load_model(
            name, revision=revision, dtype=dtype, device=device, quantization=quantization, device_map=device_map
        )
        # so that other uses of the model keep working
        model.set_attn_implementation("sdpa")
    engine = GuestEngine(model, tokenizer, attention=attention, chunk_tokens=chunk_tokens)
    if chat is None:
        chat = bool(getattr(tokenizer, "chat_template", None))
    wording = Template.parse(template, "template")
    if not wording.has_question:
        raise UserError("template: it must contain {input}, the place of the question, after {context}")
    return Model(engine, wording, chat)


@dataclass(frozen=True)
class Model:
    """A model and the wording of its prompts."""

    engine: LocalEngine
    template: Template
    chat: bool

    @property
    def tokenizer(self) -> Any:
        """Return the model's tokenizer; None if the model was loaded without one."""
        return self.engine.tokenizer

    def read(self, context: Text, *, policies: Sequence[PolicyLike] | None = None) -> Context:
        """Return a context that is read once with the full cache and can be compressed in any number of ways.

        policies: those that it will be compressed with, so that only the statistics that they read are computed; None:
        all statistics. Raises UserError for a context without a token.
        """
        from kv_transition.api.context import Context

        tokens = list(self.context_ids(context)) if isinstance(context, str) else list(context)
        if not tokens:
            raise UserError("the context is empty; give at least one token")
        read = STATISTICS if policies is None else frozenset().union(*(policy_of(p).statistics for p in policies))
        started = self.engine.clock()
        state = self.engine.extend(None, tokens, read)
        text = context if isinstance(context, str) else None
        return Context(self, tokens, text, state, read, self.engine.clock() - started)

    def context_ids(self, context: str) -> list[int]:
        """Return the token ids of the first segment of a prompt: everything up to the end of the context."""
        return self._ids(self._segments(context, "")[0], special=not self.chat)

    def question_ids(self, context: str | None, question: Text) -> list[int]:
        """Return the token ids of the second segment: everything after the context. Raises UserError if it is empty."""
        if not isinstance(question, str):
            ids = list(question)
        elif context is None:
            _, text = self.template.fill("", question)
            ids = self._ids(text, special=False)
        else:
            head, tail = self._segments(context, question)
            if head != self._segments(context, "")[0]:
                raise UserError(
                    "the chat template changes the context with the question; load the model with chat=False"
                )
            ids = self._ids(tail, special=False)
        if not ids:
            raise UserError("the question is empty; give at least one token")
        return ids

    def text_ids(self, text: Text) -> list[int]:
        """Return the token ids of a text that continues the context."""
        return self._ids(text, special=False) if isinstance(text, str) else list(text)

    def text_of(self, tokens: Sequence[int]) -> str:
        """Return the text of an answer's tokens; empty without a tokenizer."""
        return "" if self.tokenizer is None else self.tokenizer.decode(tokens, skip_special_tokens=True)

    def _segments(self, context: str, question: str) -> tuple[str, str]:
        segments = self.template.fill(context, question)
        return render_chat(self.tokenizer, *segments) if self.chat else segments

    def _ids(self, text: str, *, special: bool) -> list[int]:
        if self.tokenizer is None:
            raise UserError("the model was loaded without a tokenizer; give one to load(), or give token ids")
        return self.tokenizer(text, add_special_tokens=special, verbose=False).input_ids
