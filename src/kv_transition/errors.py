"""The exception for bad input, which users read."""


class UserError(Exception):
    """Bad input: one sentence that names the key, file or row and says what would be right.

    Every entry point prints it without a traceback and exits with status 2. What a file or a library said may stand in
    it, so line breaks and characters that a screen would obey are taken out.
    """

    def __init__(self, sentence: str = "") -> None:
        super().__init__(" ".join("".join(c if c.isprintable() else " " for c in str(sentence)).split()))


def shown(value: object, width: int = 80) -> str:
    """Return a value as code writes it, cut to ``width`` characters."""
    text = repr(value)
    return text if len(text) <= width else f"{text[: width - 4]} ..."
