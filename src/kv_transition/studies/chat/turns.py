"""The tokens of each turn of a conversation, for any answer of the model.

A chat template renders a whole conversation, but a growing cache reads only the new part. Therefore the template is
rendered with a placeholder for each answer and split there. The *opening* is the text before an answer that has not
been read yet; the *closing* is the text after it. Between them the model's own token ids are used unchanged. This is
valid only if the template renders earlier turns the same way whatever follows them, which is checked.

A tokenizer without a chat template gets a plain one: the system message, then ``User: ...`` and ``Assistant:``, with a
blank line between turns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kv_transition.data.tokens import TEMPLATE_DATE
from kv_transition.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# A placeholder for an answer while a template is rendered: private-use characters, which no text should contain. A
# template that removes the reasoning of earlier answers would remove a part of it.
_SAID = "\ue000<think>\ue001</think>\ue002"

Message = dict[str, str]


@dataclass(frozen=True)
class Turn:
    """One of the user's turns: the token ids to read before and after the model's answer."""

    user: str
    opening: list[int]
    closing: list[int]


def render(tokenizer: PreTrainedTokenizerFast, system: str | None, users: Sequence[str], *, chat: bool) -> list[Turn]:
    """Return the turns of a conversation with a ``system`` message (or None) and the messages ``users``.

    chat: whether to use the tokenizer's chat template. Special tokens that a tokenizer puts before a text are in the
    first opening; a chat template contains them. Raises UserError if the template fails, or renders earlier turns
    differently when later ones follow.
    """
    pieces = _pieces(tokenizer, system, users) if chat else _plain(system, users)

    def encode(text: str, special: bool = False) -> list[int]:
        return tokenizer(text, add_special_tokens=special, verbose=False).input_ids

    return [
        Turn(user, encode(opening, special=number == 0 and not chat), encode(closing))
        for number, (user, (opening, closing)) in enumerate(zip(users, pieces, strict=True))
    ]


def _plain(system: str | None, users: Sequence[str]) -> list[tuple[str, str]]:
    first = "" if system is None else f"{system}\n\n"
    return [(f"{'' if number else first}User: {user}\nAssistant:", "\n\n") for number, user in enumerate(users)]


def _pieces(tokenizer: PreTrainedTokenizerFast, system: str | None, users: Sequence[str]) -> list[tuple[str, str]]:
    """Return the text before and after each answer."""
    messages: list[Message] = [] if system is None else [{"role": "system", "content": system}]
    pieces = []
    before = ""
    for number, user in enumerate(users, 1):
        messages.append({"role": "user", "content": user})
        asked = _rendered(tokenizer, messages, prompt=True)
        if not asked.startswith(before):
            raise UserError(
                f"model.chat_template: the chat template renders the turns before turn {number} differently when "
                f"that turn follows ({_difference(before, asked)}), so a conversation cannot be fed turn by turn; set "
                "it to never"
            )
        messages.append({"role": "assistant", "content": _SAID})
        answered = _rendered(tokenizer, messages, prompt=False)
        if not answered.startswith(asked + _SAID):
            raise UserError(
                f"model.chat_template: the chat template does not render the answer of turn {number} unchanged "
                f"after the start of an answer ({_difference(asked + _SAID, answered)}): it changes answers, or "
                "removes their reasoning; set it to never"
            )
        pieces.append((asked[len(before) :], answered[len(asked + _SAID) :]))
        before = answered
    return pieces


def _rendered(tokenizer: PreTrainedTokenizerFast, messages: list[Message], *, prompt: bool) -> str:
    try:
        return tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=prompt, date_string=TEMPLATE_DATE
        )
    except Exception as error:  # a template may raise any exception
        raise UserError(f"model.chat_template: the tokenizer's chat template fails: {error}; set it to never") from None


def _difference(expected: str, got: str) -> str:
    """Return the first place where two texts differ, as a few words of each."""
    at = next((i for i, (a, b) in enumerate(zip(expected, got, strict=False)) if a != b), min(len(expected), len(got)))
    return f"{_readable(expected[at : at + 30])!r} became {_readable(got[at : at + 30])!r}"


def _readable(text: str) -> str:
    return text.replace("\ue000", "(answer) ").replace("\ue001", "(thought)").replace("\ue002", " (end of answer)")
