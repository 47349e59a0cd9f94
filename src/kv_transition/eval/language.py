"""The language of a text, by py3langid: naive Bayes on byte n-grams, deterministic."""

from __future__ import annotations

from functools import cache
from typing import Any


@cache
def _identifier(languages: tuple[str, ...], confidence: float) -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    identifier = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True, min_confidence=confidence)
    identifier.set_languages(languages)
    return identifier


def most_likely(text: str, languages: tuple[str, ...], confidence: float = 0.0) -> str:
    """Return the ISO 639-1 code of the most likely one of ``languages``, or ``und`` if its probability is below
    ``confidence``.
    """
    return _identifier(languages, confidence).classify(text)[0]
