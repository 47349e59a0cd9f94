"""IFEval's checkable instructions: whether an answer follows each of them.

Source: Zhou et al., "Instruction-following evaluation for large language models", arXiv 2311.07911, strict form.
Differences: sentences and capital words are found by regular expressions instead of nltk's models, languages by
py3langid instead of langdetect, and case is checked without detecting the language first.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from kv_transition.errors import UserError
from kv_transition.eval.language import most_likely
from kv_transition.parsing import parse_json

Check = Callable[[str, Mapping[str, Any]], bool]

_SAID = ("My answer is yes.", "My answer is no.", "My answer is maybe.")


_LANGUAGES = (
    *("ar", "bg", "bn", "de", "en", "es", "fa", "fi", "fr", "gu", "he", "hi", "it", "ja", "kn", "ko", "ml", "mr"),
    *("ne", "pa", "pl", "pt", "ru", "sw", "ta", "te", "th", "uk", "ur", "vi"),
)
"""languages in which an answer may be requested"""


def instruction(text: str, gold: str, all_classes: Sequence[str] = ()) -> float:
    """Return 1 if the answer follows the instruction ``gold``, an object with ``id`` and ``kwargs`` as JSON, else 0.

    Raises:
        UserError: there is no such instruction, or one of its arguments is missing or has a wrong type.
    """
    asked = parse_json(gold, "an instruction")
    name, arguments = asked.get("id"), asked.get("kwargs") or {}
    if name not in CHECKS:
        raise UserError(f"instruction {name!r} is not known; known are {', '.join(CHECKS)}")
    if not text.strip():
        return 0.0
    try:
        return float(CHECKS[name](text, arguments))
    except (KeyError, TypeError, AttributeError, ValueError, re.error) as error:
        raise UserError(f"instruction {name}: its kwargs {json.dumps(arguments)} are invalid ({error})") from None


def _compared(count: int, relation: str, wanted: int) -> bool:
    if relation not in ("less than", "at least"):
        raise ValueError(f"a relation is 'less than' or 'at least', not {relation!r}")
    return count < wanted if relation == "less than" else count >= wanted


def _keywords(text: str, a: Mapping[str, Any]) -> bool:
    return all(re.search(keyword, text, re.IGNORECASE) for keyword in a["keywords"])


def _keyword_frequency(text: str, a: Mapping[str, Any]) -> bool:
    return _compared(len(re.findall(a["keyword"].strip(), text, re.IGNORECASE)), a["relation"], a["frequency"])


def _forbidden(text: str, a: Mapping[str, Any]) -> bool:
    return not any(re.search(rf"\b{word}\b", text, re.IGNORECASE) for word in a["forbidden_words"])


def _letter_frequency(text: str, a: Mapping[str, Any]) -> bool:
    return _compared(text.lower().count(a["letter"].strip().lower()), a["let_relation"], a["let_frequency"])


def _sentences(text: str, a: Mapping[str, Any]) -> bool:
    pieces = re.split(r"(?<=[.!?])[\"')\]]*\s+", text.strip())
    return _compared(sum(bool(re.search(r"\w", piece)) for piece in pieces), a["relation"], a["num_sentences"])


def _words(text: str, a: Mapping[str, Any]) -> bool:
    return _compared(len(re.findall(r"\w+", text)), a["relation"], a["num_words"])


def _between(pieces: list[str]) -> int | None:
    """Return the number of pieces, without an empty first and last one; None if one in between is empty."""
    if any(not piece.strip() for piece in pieces[1:-1]):
        return None
    return sum(bool(piece.strip()) for piece in pieces)


def _paragraphs(text: str, a: Mapping[str, Any]) -> bool:
    return _between(re.split(r"\s?\*\*\*\s?", text)) == a["num_paragraphs"]


def _nth_paragraph(text: str, a: Mapping[str, Any]) -> bool:
    pieces = text.split("\n\n")
    count, nth = sum(bool(piece.strip()) for piece in pieces), a["nth_paragraph"]
    if nth > count or not pieces[nth - 1].strip():
        return False
    first = pieces[nth - 1].split()[0].lstrip("'").lstrip('"')
    return count == a["num_paragraphs"] and re.split(r"[.,?!'\"]", first)[0].lower() == a["first_word"].lower()


def _placeholders(text: str, a: Mapping[str, Any]) -> bool:
    return len(re.findall(r"\[.*?\]", text)) >= a["num_placeholders"]


def _postscript(text: str, a: Mapping[str, Any]) -> bool:
    marker = a["postscript_marker"].strip()
    forms = {"P.P.S": r"\s*p\.\s?p\.\s?s.*$", "P.S.": r"\s*p\.\s?s\..*$"}
    pattern = forms.get(marker, r"\s*" + marker.lower() + r".*$")
    return re.search(pattern, text.lower(), re.MULTILINE) is not None


def _bullets(text: str, a: Mapping[str, Any]) -> bool:
    starred = re.findall(r"^\s*\*[^\*].*$", text, re.MULTILINE)
    dashed = re.findall(r"^\s*-.*$", text, re.MULTILINE)
    return len(starred) + len(dashed) == a["num_bullets"]


def _highlights(text: str, a: Mapping[str, Any]) -> bool:
    single = (part.strip("*") for part in re.findall(r"\*[^\n\*]*\*", text))
    double = (part.removeprefix("**").removesuffix("**") for part in re.findall(r"\*\*[^\n\*]*\*\*", text))
    return sum(bool(part.strip()) for part in (*single, *double)) >= a["num_highlights"]


def _sections(text: str, a: Mapping[str, Any]) -> bool:
    return len(re.split(rf"\s?{a['section_spliter'].strip()}\s?\d+\s?", text)) - 1 >= a["num_sections"]


def _json(text: str, a: Mapping[str, Any]) -> bool:
    bare = text.strip()
    for fence in ("```json", "```Json", "```JSON", "```"):
        bare = bare.removeprefix(fence)
    try:
        json.loads(bare.removesuffix("```").strip())
    except ValueError:
        return False
    return True


def _title(text: str, a: Mapping[str, Any]) -> bool:
    return any(title.lstrip("<").rstrip(">").strip() for title in re.findall(r"<<[^\n]+>>", text))


def _two(text: str, a: Mapping[str, Any]) -> bool:
    pieces = text.split("******")
    said = [piece.strip() for piece in pieces if piece.strip()]
    return _between(pieces) is not None and len(said) == 2 and said[0] != said[1]


def _repeats(text: str, a: Mapping[str, Any]) -> bool:
    return text.strip().lower().startswith(a["prompt_to_repeat"].strip().lower())


def _ends(text: str, a: Mapping[str, Any]) -> bool:
    return text.strip().strip('"').lower().endswith(a["end_phrase"].strip().lower())


def _capital_words(text: str, a: Mapping[str, Any]) -> bool:
    count = sum(word.isupper() for word in re.findall(r"[\w'-]+", text))
    return _compared(count, a["capital_relation"], a["capital_frequency"])


def _quoted(text: str, a: Mapping[str, Any]) -> bool:
    bare = text.strip()
    return len(bare) > 1 and bare[0] == bare[-1] == '"'


def _language(text: str, a: Mapping[str, Any]) -> bool:
    """Whether the asked language is the most likely one; a text without letters is in every language."""
    if a["language"] not in _LANGUAGES:
        raise ValueError(f"language is one of {', '.join(_LANGUAGES)}, not {a['language']!r}")
    return not re.search(r"[^\W\d_]", text) or most_likely(text, _LANGUAGES) == a["language"]


CHECKS: dict[str, Check] = {
    "keywords:existence": _keywords,
    "keywords:frequency": _keyword_frequency,
    "keywords:forbidden_words": _forbidden,
    "keywords:letter_frequency": _letter_frequency,
    "length_constraints:number_sentences": _sentences,
    "length_constraints:number_paragraphs": _paragraphs,
    "length_constraints:number_words": _words,
    "length_constraints:nth_paragraph_first_word": _nth_paragraph,
    "detectable_content:number_placeholders": _placeholders,
    "detectable_content:postscript": _postscript,
    "detectable_format:number_bullet_lists": _bullets,
    "detectable_format:constrained_response": lambda text, a: any(said in text for said in _SAID),
    "detectable_format:number_highlighted_sections": _highlights,
    "detectable_format:multiple_sections": _sections,
    "detectable_format:json_format": _json,
    "detectable_format:title": _title,
    "combination:two_responses": _two,
    "combination:repeat_prompt": _repeats,
    "startend:end_checker": _ends,
    "startend:quotation": _quoted,
    "change_case:capital_word_frequency": _capital_words,
    "change_case:english_capital": lambda text, a: text.isupper(),
    "change_case:english_lowercase": lambda text, a: text.islower(),
    "punctuation:no_comma": lambda text, a: "," not in text,
    "language:response_language": _language,
}
