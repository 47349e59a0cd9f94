"""Remove the notes of producers and transcribers from the books of PG-19.

PG-19 (Rae et al. 2019, arXiv 1911.05507) consists of Project Gutenberg's files without their licence but with
volunteers' notes. docs/data.md lists what is removed and what is kept.
"""

from __future__ import annotations

import re

_BLANK = re.compile(r"\A(?:[ \t]*\n)+")
_TO_ITS_END = r".*?(?=\n[ \t]*\n|\Z)"
"""pattern of the rest of a paragraph"""

# A first paragraph that names the producers of the file.
_PRODUCERS = re.compile(
    r"\s*(this )?(produced|transcribed|prepared|scanned|digitized|proofed|e-?text|e-?book)\b[^\n]*\b(by|from)\b"
    + _TO_ITS_END,
    re.IGNORECASE | re.DOTALL,
)

_NOTE = r"transcriber['’]?s?['’]? notes?"
# A note in brackets may contain pairs of brackets: [Transcriber's note: [=e] stands for ...]
_BRACKETED = re.compile(rf"\[\s*{_NOTE}\b[^\[\]]*(?:\[[^\[\]]*\][^\[\]]*)*\]", re.IGNORECASE)
# A heading on its own line, and the paragraph below it.
_HEADED = re.compile(rf"^[ \t]*{_NOTE}[ \t]*:?[ \t]*\n\s*\S{_TO_ITS_END}", re.IGNORECASE | re.DOTALL | re.M)
_END = re.compile(r"^[ \t*]*end of (?:the |this )?project gutenberg\b", re.IGNORECASE | re.M)


def clean(text: str) -> str:
    r"""Return the text of a book from its first to its last own line, with lines ending in a newline."""
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    if end := _END.search(text, len(text) // 2):
        text = text[: end.start()]
    # A note in the last quarter is a list of corrections that continues to the end.
    if note := _HEADED.search(text, 3 * len(text) // 4):
        text = text[: note.start()]
    text = _HEADED.sub("", _BRACKETED.sub("", text))
    while producers := _PRODUCERS.match(text):
        text = text[producers.end() :]
    return _BLANK.sub("", text).rstrip()
