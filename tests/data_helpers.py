"""Small tokenizers and files for the tests of the data layer."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Sequence
from pathlib import Path

import pytest

KVT_DATA = Path(os.environ["KVT_DATA"]) if os.environ.get("KVT_DATA") else None
needs_data = pytest.mark.skipif(KVT_DATA is None, reason="real input: KVT_DATA does not name the data folder")

WORDS = [f"w{i}" for i in range(50)]
_OTHER = "Read Question Answer Give the text below A question about it follows only answer in as few words possible"


_VOCABULARY = ("<pad>", "<bos>", "<eos>", "<unk>", *WORDS, *dict.fromkeys(_OTHER.split()), *"[]:.,?", "user", "bot")


def word_tokenizer(folder: Path, chat_template: str | None = None, vocabulary: Sequence[str] = _VOCABULARY) -> Path:
    """Save a tokenizer with one token per word and <bos> in front; return the folder of the model that contains it."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", unk_token="<unk>"
    )
    fast.chat_template = chat_template
    fast.save_pretrained(folder / "tokenizer")
    return folder


def write_jsonl(path: Path, records: list) -> Path:
    """Write one record per line; a string is written as the line itself."""
    lines = [record if isinstance(record, str) else json.dumps(record, ensure_ascii=False) for record in records]
    content = ("\n".join(lines) + "\n").encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def example(i: int, n_words: int = 5, **fields) -> dict:
    """Return a bring-your-own record whose context has ``n_words`` words and differs for every i below 50**3."""
    number = [WORDS[i % 50], WORDS[i // 50 % 50], WORDS[i // 2500]]
    context = " ".join((number + WORDS * n_words)[:n_words])
    return {"id": f"e{i}", "question": f"{WORDS[i % 50]} w{i // 50} ?", "context": context, "answers": ["w1"], **fields}
