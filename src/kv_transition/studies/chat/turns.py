"""A conversation as the tokens that are fed in each turn, whatever the model answers.

A chat template writes a whole conversation; a growing cache takes only what is new. So the template is rendered with a
placeholder for each answer, and cut there: what stands before an answer and has not been fed yet is its *opening*, what
stands behind it is its *closing*. Between the two the model's own token ids stay as they were said. This is right only
if the template writes the earlier turns in the same way whatever follows them, which is checked.

A tokenizer without a chat template gets a plain one: the system's text, then ``User: ...`` and ``Assistant:``, turns
apart by a blank line.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kv_transition.data.tokens import TEMPLATE_DATE
from kv_transition.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# Stands for an answer while a template is rendered; private-use characters, which no text should hold. Templates that
# leave the reasoning out of earlier answers would lose a part of it.
_SAID = "\ue000<think>\ue001</think>\ue002"

Message = dict[str, str]


@dataclass(frozen=True)
class Turn:
    """One of the user's turns: token ids that are read before the model answers, and behind its answer."""

    user: str
    opening: list[int]
    closing: list[int]


def render(tokenizer: PreTrainedTokenizerFast, system: str | None, users: Sequence[str], *, chat: bool) -> list[Turn]:
    """The turns of a conversation in which the system says ``system`` first (None: nothing) and the user ``users``.

    chat: whether to use the tokenizer's chat template. Special tokens that a tokenizer puts before a text belong to the
    first opening; a chat template holds them itself.

    Raises UserError if the template fails, or renders earlier turns in another way once there are later ones.
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
    """Text before and behind each answer."""
    messages: list[Message] = [] if system is None else [{"role": "system", "content": system}]
    pieces = []
    before = ""
    for number, user in enumerate(users, 1):
        messages.append({"role": "user", "content": user})
        asked = _rendered(tokenizer, messages, prompt=True)
        if not asked.startswith(before):
            raise UserError(
                f"model.chat_template: the chat template writes the turns before turn {number} in another way once "
                f"that one is there ({_difference(before, asked)}), so no conversation can be fed turn by turn; set it "
                "to never"
            )
        messages.append({"role": "assistant", "content": _SAID})
        answered = _rendered(tokenizer, messages, prompt=False)
        if not answered.startswith(asked + _SAID):
            raise UserError(
                f"model.chat_template: the chat template does not write the answer of turn {number} as it was said, "
                f"right behind the start of an answer ({_difference(asked + _SAID, answered)}): it changes answers, or "
                "leaves reasoning out of them; set it to never"
            )
        pieces.append((asked[len(before) :], answered[len(asked + _SAID) :]))
        before = answered
    return pieces


def _rendered(tokenizer: PreTrainedTokenizerFast, messages: list[Message], *, prompt: bool) -> str:
    try:
        return tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=prompt, date_string=TEMPLATE_DATE
        )
    except Exception as error:  # a template raises what it likes
        raise UserError(f"model.chat_template: the tokenizer's chat template fails: {error}; set it to never") from None


def _difference(expected: str, got: str) -> str:
    """The first place where two texts differ, in a few words of each."""
    at = next((i for i, (a, b) in enumerate(zip(expected, got, strict=False)) if a != b), min(len(expected), len(got)))
    return f"{_readable(expected[at : at + 30])!r} became {_readable(got[at : at + 30])!r}"


def _readable(text: str) -> str:
    return text.replace("\ue000", "(answer) ").replace("\ue001", "(thought)").replace("\ue002", " (end of answer)")
