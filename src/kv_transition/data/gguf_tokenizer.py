"""The tokenizer of a GGUF model, read by transformers and stored as a folder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kv_transition.data import gguf


def tokenizer_folder(name: str) -> Path:
    """Return the folder of the tokenizer, and create it if needed. Raises UserError as `model_folder` does."""
    return gguf.made(name, "tokenizer", lambda folder: tokenizer(name).save_pretrained(folder))


def tokenizer(name: str) -> Any:
    """Return the tokenizer of a GGUF file. Raises UserError if transformers cannot read it."""
    from transformers import AutoTokenizer

    gguf.header(name)
    file = gguf.gguf_file(name)
    with without_progress_bars():
        try:
            return AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name, trust_remote_code=False)
        except (ValueError, KeyError, NotImplementedError, RuntimeError, OSError, AttributeError) as error:
            raise gguf.unreadable(name, error) from None


@contextmanager
def without_progress_bars() -> Iterator[None]:
    """Turn off transformers' progress bars within the block."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.enable_progress_bar()
