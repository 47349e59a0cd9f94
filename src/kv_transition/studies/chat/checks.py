"""Checks: instructions of a conversation that a rule can test, and the turns at which they are in force.

A check is a JSON object::

    {"kind": "contains", "value": "please", "id": "c2", "since": 3, "until": 5, "overrides": "c1"}

``kind`` is required, and ``value`` for every kind except ``json``. `kv_transition.studies.chat.rules.passes` lists the
kinds.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from kv_transition.errors import UserError

Kind = Literal[
    "max_words", "min_words", "max_sentences", "contains", "excludes", "starts_with", "ends_with", "case", "json",
    "language", "matches", "lines", "answer",
]  # fmt: skip
KINDS: tuple[str, ...] = get_args(Kind)
SENSITIVE = frozenset({"contains", "excludes", "starts_with", "ends_with", "matches"})
"""kinds that have the key case_sensitive"""

# ISO 639-1. Closely related languages are omitted, because none of them would be likely enough for a short sentence.
# fmt: off
LANGUAGES = (
    "ar", "bg", "bn", "ca", "cs", "da", "de", "el", "en", "es", "et", "fa", "fi", "fr", "gu", "he", "hi", "hr", "hu",
    "id", "it", "ja", "kn", "ko", "lt", "lv", "ml", "mr", "nl", "no", "pa", "pl", "pt", "ro", "ru", "sk", "sl", "sq",
    "sv", "sw", "ta", "te", "th", "tl", "tr", "uk", "ur", "vi", "zh",
)
# fmt: on

MAX_EXPRESSION, MAX_COPIES = 1_000, 10_000
"""maximum characters of a regular expression, and maximum product of the numbers in its {braces}"""

_Count = Annotated[int, Field(ge=1, strict=True)]
_Phrase = Annotated[str, Field(strict=True, pattern=r"\S")]
_Phrases = Annotated[list[_Phrase], Field(min_length=1)]
_WRITTEN: dict[str, tuple[TypeAdapter[Any], str]] = {
    **dict.fromkeys(
        ("max_words", "min_words", "max_sentences", "lines"),
        (TypeAdapter(_Count), "a whole number of at least 1, such as 20"),
    ),
    **dict.fromkeys(
        ("contains", "excludes", "starts_with", "ends_with", "answer"),
        (TypeAdapter(_Phrase | _Phrases), "a text, or a list of texts, that are not blank"),
    ),
    "case": (TypeAdapter(Literal["upper", "lower", "title"]), "one of upper, lower, title"),
    "json": (TypeAdapter(_Phrases | None), "a list of the keys that the object has, or null"),
    "language": (TypeAdapter(Literal[LANGUAGES]), f"one of the ISO 639-1 codes {' '.join(LANGUAGES)}"),
    "matches": (TypeAdapter(re.Pattern), "a regular expression of Python's re"),
}


class Check(BaseModel):
    """A check with all defaults filled in.

    ``since``: first of the user's turns (from 1) at which it is in force; ``until``: the last one, None: the end of the
    conversation; ``due``: those of these turns to which it applies ("when asked about a pet"), None: all of them;
    ``overrides``: id of an earlier check that it replaces from ``since`` on.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    kind: Kind
    value: Any = None
    id: str = Field(pattern=r"\S")
    since: int = Field(ge=1)
    until: int | None = None
    due: list[int] | None = None
    overrides: str | None = None
    case_sensitive: bool = False

    @field_validator("value")
    @classmethod
    def _fits(cls, value: Any, info: ValidationInfo) -> Any:
        if "kind" in info.data:
            form, text = _WRITTEN[info.data["kind"]]
            if info.data["kind"] == "matches" and isinstance(value, str):
                _check_expression(value)  # before the expression is compiled
            try:
                form.validate_python(value)
            except ValidationError:
                raise ValueError(f"{info.data['kind']} needs {text}") from None
        return value

    @model_validator(mode="after")
    def _agrees(self) -> Check:
        if self.value is None and self.kind != "json":
            raise ValueError(f"{self.kind} needs value, {_WRITTEN[self.kind][1]}")
        if self.until is not None and self.until < self.since:
            raise ValueError(f"until is {self.until}, but the check begins at turn {self.since}")
        if self.case_sensitive and self.kind not in SENSITIVE:
            raise ValueError(f"{self.kind} has no case_sensitive; leave it out")
        if self.overrides == self.id:
            raise ValueError("a check cannot override itself")
        return self

    @property
    def standing(self) -> bool:
        """Whether the check is meant for more than the turn at which it is given."""
        return self.until is None or self.until > self.since

    @property
    def values(self) -> list[str]:
        """The value as a list."""
        if self.value is None:
            return []
        return list(self.value) if isinstance(self.value, list) else [self.value]

    def in_force(self, turn: int) -> bool:
        """Return whether the check is in force at the user's turn ``turn``, even if it is overridden."""
        lasts = self.since <= turn and (self.until is None or turn <= self.until)
        return lasts and (self.due is None or turn in self.due)


def _check_expression(expression: str) -> None:
    """Raise ValueError for an expression that is too large to compile, because re expands counted repetitions."""
    import regex

    copies = 1
    for low, high in re.findall(r"\{(\d*),?(\d*)\}", expression[:MAX_EXPRESSION]):
        copies *= max(int(low or 1), int(high or 1), 1)
    if len(expression) > MAX_EXPRESSION or copies > MAX_COPIES:
        raise ValueError(
            f"matches needs an expression of at most {MAX_EXPRESSION:,} characters whose counted repetitions multiply "
            f"to at most {MAX_COPIES:,}"
        )
    try:
        regex.compile(expression)
    except regex.error as error:
        raise ValueError(f"matches needs {_WRITTEN['matches'][1]} ({error})") from None


def validate(check: Any, where: str, turn: int = 1, id: str = "c1") -> Check:
    """Return a check with its defaults. ``since``: the ``turn`` in which it is given; ``until``: the end of the
    conversation.

    By default a check of kind ``answer`` ends with its first turn. Raises UserError, which begins with ``where`` (file,
    conversation and turn).
    """
    if not isinstance(check, Mapping):
        raise UserError(f"{where}: a check is an object such as {{'kind': 'max_words', 'value': 20}}, not {check!r}")
    given = {"id": id, "since": turn} | dict(check)
    if given.get("kind") == "answer" and "until" not in given:
        given["until"] = given["since"]
    try:
        return Check.model_validate(given)
    except ValidationError as error:
        raise UserError(f"{where}: check {given['id']}: {_sentence(error)}") from None


def _sentence(error: ValidationError) -> str:
    first = error.errors()[0]
    key, kind = ".".join(map(str, first["loc"][:1])), first["type"]
    if kind == "extra_forbidden":
        return f"there is no key {key!r}; allowed are {', '.join(Check.model_fields)}"
    if kind == "missing":
        return f"{key} is missing, one of {', '.join(KINDS)}"
    if kind == "literal_error":
        return f"{key} is {first['input']!r}; choose one of {', '.join(KINDS)}"
    if kind == "value_error":
        given = f"; value is {first['input']!r}" if key == "value" else ""
        return f"{first['ctx']['error']}{given}"
    return f"{key}: {first['msg'][0].lower()}{first['msg'][1:].replace('Input', 'it')}, not {first['input']!r}"


def of_conversation(conversation: Mapping[str, Any], where: str) -> list[Check]:
    """Return all checks of ``{"turns": [{"role", "content", "checks"?}], "checks"?}`` in the given order.

    Turns count the user's messages. A check in a system message begins at turn 1; a check in an assistant's message is
    refused. Checks without an id get the ids c1, c2, ... by their position. Raises UserError if a check is malformed,
    if two have the same id, or if one overrides a check that does not precede it.
    """
    placed: list[tuple[Any, str, int]] = [(c, where, 1) for c in _checks(conversation, where)]
    turn = 0
    for message in conversation["turns"]:
        turn += message["role"] == "user"
        at = f"{where}, turn {max(turn, 1)}"
        own = _checks(message, at)
        if own and message["role"] == "assistant":
            raise UserError(f"{at}: checks belong to a message of the user or the system; move them there")
        placed += [(c, at, max(turn, 1)) for c in own]
    found: dict[str, Check] = {}
    for i, (given, at, begins) in enumerate(placed, 1):
        check = validate(given, at, begins, f"c{i}")
        if check.id in found:
            raise UserError(f"{at}: two checks have the id {check.id}; give each check a different id")
        if check.since > turn:
            raise UserError(f"{at}: check {check.id} begins at turn {check.since}, but the user has {turn} turns")
        if check.overrides is not None:
            earlier = found.get(check.overrides)
            if earlier is None or earlier.since >= check.since:
                raise UserError(
                    f"{at}: check {check.id} overrides {check.overrides!r}, which is not a check of an earlier turn"
                )
        found[check.id] = check
    return list(found.values())


def _checks(holder: Mapping[str, Any], where: str) -> Sequence[Any]:
    checks = holder.get("checks") or []
    if not isinstance(checks, Sequence) or isinstance(checks, str):
        raise UserError(f"{where}: checks must be a list of checks, not {checks!r}")
    return checks


def at_turn(checks: Sequence[Check], turn: int) -> list[tuple[Check, str | None]]:
    """Return the checks in force at a turn, each with the id of the check that overrides it by then, or None.

    An overridden check remains in the list, because whether it is still followed shows which of the two wins.
    """
    newer = {check.overrides: check.id for check in checks if check.overrides is not None and check.since <= turn}
    return [(check, newer.get(check.id)) for check in checks if check.in_force(turn)]


_CASES = {
    "upper": "no lower-case letters",
    "lower": "no capital letters",
    "title": "a capital letter at the start of every word",
}


def describe(check: Check) -> str:
    """Return the check as words: ``has at most 20 words``."""
    given = ", ".join(f'"{value}"' for value in check.values)
    match check.kind:
        case "max_words":
            return f"has at most {check.value} words"
        case "min_words":
            return f"has at least {check.value} words"
        case "max_sentences":
            return f"has at most {check.value} sentences"
        case "lines":
            return f"has exactly {check.value} lines that are not blank"
        case "contains":
            return f"contains {given}"
        case "excludes":
            return f"does not contain {given}"
        case "starts_with":
            return f"starts with {given}"
        case "ends_with":
            return f"ends with {given}"
        case "case":
            return f"has {_CASES[check.value]}"
        case "json":
            return f"is one JSON value and nothing else{f', an object with the keys {given}' if given else ''}"
        case "language":
            return f"is written in the language with the ISO 639-1 code {given}"
        case "matches":
            return f"matches the regular expression {check.value}"
        case "answer":
            return f"is {given}, articles, punctuation and capital letters aside"
    raise ValueError(f"a check's kind is one of {', '.join(KINDS)}, not {check.kind!r}")
