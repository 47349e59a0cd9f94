"""The exception for bad input, with a message for the user."""


class UserError(Exception):
    """Bad input: one sentence that names the key, file or row and says what would be right.

    Every entry point prints it without a traceback and exits with status 2. The sentence may quote a file or a library,
    so line breaks and control characters are removed.
    """

    def __init__(self, sentence: str = "") -> None:
        super().__init__(" ".join("".join(c if c.isprintable() else " " for c in str(sentence)).split()))


def shown(value: object, width: int = 80) -> str:
    """Return the Python form of a value, cut to ``width`` characters."""
    text = repr(value)
    return text if len(text) <= width else f"{text[: width - 4]} ..."
