"""The token ids of a request's prompt, in two segments as in the cells of an experiment."""

from __future__ import annotations

from collections.abc import Sequence
from http import HTTPStatus
from typing import Any

from kv_transition.data.tokens import TEMPLATE_DATE
from kv_transition.engines.local import LocalEngine
from kv_transition.serve.refusal import RefusalError
from kv_transition.serve.schema import ChatRequest, CompletionRequest, InMessage
from kv_transition.serve.work import Prompt

_CERTAINLY = 4
"""A text with at most this many characters per allowed token is tokenized at once, without counting first"""

_PIECE = 8192
"""Characters of a longer text that are tokenized at a time, to count its tokens"""

_SEAM = 16
"""Upper bound of the tokens that cutting a text in two adds"""

# Marks the end of the context while a chat template is rendered: private-use characters, which no text should contain.
_BOUNDARY = "\ue000\ue0fe\ue000"


def prompt_of(engine: LocalEngine, request: ChatRequest | CompletionRequest, max_length: int) -> Prompt:
    """Return the prompt as the model reads it.

    max_length: maximum number of tokens; a text that certainly has more is not tokenized completely. Raises
    RefusalError if there is no prompt, if its context has no end, or if it is too long.
    """
    if isinstance(request, ChatRequest):
        return _of_chat(engine.tokenizer, request, max_length)
    prompt = request.prompt
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str | list):
        (prompt,) = prompt
    if isinstance(prompt, list) and not all(isinstance(token, int) for token in prompt):
        raise _bad("prompt", f"{len(prompt)} prompts in one request; send one")
    at = request.kv_context
    if at is not None and not 0 < at < len(prompt):
        raise _bad("kv_context", f"{at} is not inside a prompt of length {len(prompt)}")
    if isinstance(prompt, str):
        _require_short(engine.tokenizer, prompt, max_length)
        if at is None:
            return _whole(_tokens(engine.tokenizer, prompt, special=True))
        return _segments(engine.tokenizer, prompt[:at], prompt[at:], special=True)
    if len(prompt) > max_length:
        raise _too_long(len(prompt), max_length)
    vocabulary = engine.model.get_input_embeddings().num_embeddings
    if strange := [token for token in prompt if not 0 <= token < vocabulary]:
        raise _bad("prompt", f"{strange[0]} is not a token of this model, whose ids are 0 to {vocabulary - 1}")
    return _whole(prompt) if at is None else Prompt(prompt[:at], prompt[at:])


def _of_chat(tokenizer: Any, request: ChatRequest, max_length: int) -> Prompt:
    """Return the messages in the tokenizer's chat template, followed by the start of an answer."""
    if not tokenizer.chat_template:
        raise _bad("messages", "the model's tokenizer has no chat template; use /v1/completions")
    texts = [message.text for message in request.messages]
    whole = _render(tokenizer, request, texts)
    _require_short(tokenizer, whole, max_length)
    at = request.kv_context
    if at is None:
        return _whole(_tokens(tokenizer, whole, special=False))
    number, place = (at.message, at.characters) if isinstance(at, InMessage) else (at - 1, None)
    if not 0 <= number < len(texts):
        raise _bad("kv_context", f"there are {len(texts)} messages")
    text = texts[number]
    place = len(text) if place is None else place
    if place > len(text):
        raise _bad("kv_context", f"message {number} has {len(text)} characters")
    texts[number] = text[:place] + _BOUNDARY + text[place:]
    context, _, question = _render(tokenizer, request, texts).partition(_BOUNDARY)
    if context + question != whole:
        raise _bad(
            "kv_context", "the chat template changes the text of the messages, so the end of the context is unknown"
        )
    return _segments(tokenizer, context, question, special=False)


def _render(tokenizer: Any, request: ChatRequest, texts: Sequence[str]) -> str:
    pairs = zip(request.messages, texts, strict=True)
    messages = [{"role": message.role, "content": text} for message, text in pairs]
    try:
        return tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, date_string=TEMPLATE_DATE
        )
    except Exception as error:  # a template may raise any exception
        raise _bad("messages", f"the chat template refuses them: {error}") from None


def _segments(tokenizer: Any, context: str, question: str, *, special: bool) -> Prompt:
    prompt = Prompt(_tokens(tokenizer, context, special=special), _tokens(tokenizer, question, special=False))
    if not prompt.context or not prompt.question:
        raise _bad("kv_context", "context and question must have at least one token each")
    return prompt


def _whole(ids: list[int]) -> Prompt:
    if not ids:
        raise _bad("prompt", "the prompt is empty; give at least one token")
    return Prompt(ids[:-1], ids[-1:])


def _require_short(tokenizer: Any, text: str, max_length: int) -> None:
    """Raise RefusalError as soon as enough tokens of a long text have been counted.

    Tokenizing the whole text at once would need a hundred times its memory, which the process would keep. The pieces
    together have at least as many tokens as the text, except for a few at each cut. Therefore a refused text is
    certainly too long; a text that is accepted may still be slightly too long.
    """
    if len(text) <= _CERTAINLY * max_length:
        return
    counted = 0
    for start in range(0, len(text), _PIECE):
        counted += max(0, len(_tokens(tokenizer, text[start : start + _PIECE], special=False)) - _SEAM)
        if counted > max_length:
            raise _too_long(counted, max_length, "more than ")


def _too_long(tokens: int, max_length: int, least: str = "") -> RefusalError:
    return RefusalError(
        HTTPStatus.BAD_REQUEST,
        f"a prompt of {least}{tokens} tokens is longer than {max_length}",
        param="prompt",
        code="context_length_exceeded",
    )


def _tokens(tokenizer: Any, text: str, *, special: bool) -> list[int]:
    return tokenizer(text, add_special_tokens=special, verbose=False).input_ids


def _bad(param: str, message: str) -> RefusalError:
    return RefusalError(HTTPStatus.BAD_REQUEST, f"{param}: {message}", param=param)
