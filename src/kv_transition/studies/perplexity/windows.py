"""The windows of a corpus: a context, and the tokens after it that are scored.

    python -m kv_transition.studies.perplexity.windows --spec JSON --output BIN0.parquet BIN1.parquet ...

The scored tokens of a book are consecutive runs of ``stride`` tokens. Each length bin puts its own number of tokens
before the same scored tokens, so that the bins differ only in the context.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from hashlib import sha256
from typing import TYPE_CHECKING, Any

from kv_transition import provenance
from kv_transition.data.binning import choose
from kv_transition.data.tokens import load_tokenizer, tokenizer_sha256
from kv_transition.errors import UserError
from kv_transition.script import status
from kv_transition.studies.perplexity import tables
from kv_transition.studies.perplexity.corpus import books, hub_repository

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Row = dict[str, Any]


def starts(tokens: int, contexts: Sequence[int], stride: int) -> range:
    """Return where the scored tokens of each window begin in a book of ``tokens`` tokens.

    Before the first window there must be space for the longest of ``contexts`` (in tokens of the book) and one more
    token, which is fed without being scored; each window has ``stride`` tokens after its start.
    """
    return range(max(contexts) + 1, tokens - stride + 1, stride)


def windows_of(ids: Sequence[int], start: int, contexts: Sequence[int], stride: int, bos: Sequence[int]) -> list[Row]:
    """Return the window of each length bin whose scored tokens begin at ``start`` of a book's ``ids``.

    contexts: number of the book's tokens in each bin's context. bos: tokens before each context.
    """
    made = []
    for own in contexts:
        first = start - 1 - own
        context = [*bos, *ids[first : first + own]]
        made.append(
            {
                "context_start": first,
                "context_tokens": len(context),
                "prompt_sha256": sha256(json.dumps([context, []]).encode()).hexdigest(),
                "context_ids": context,
                "target_ids": list(ids[start - 1 : start + stride]),
            }
        )
    return made


def bos_of(tokenizer: PreTrainedTokenizerFast, bos: str) -> list[int]:
    """Return the token that the tokenizer itself puts before a text, if ``bos`` is auto and it does so."""
    own = tokenizer.bos_token_id
    begins = tokenizer("a")["input_ids"][:1] == [own]
    return [own] if bos == "auto" and own is not None and begins else []


def cut(section: Mapping[str, Any], tokenizer: PreTrainedTokenizerFast) -> tuple[list[list[Row]], Row]:
    """Return the rows of WINDOWS in each length bin, and facts about the choice.

    Books and windows are drawn by their names and the seed, so that a larger ``books`` or ``windows_per_book`` extends
    the choice. Books that are too short for one window are skipped.

    Raises:
        UserError: no book is long enough, or the corpus cannot be read.
    """
    stride, seed, bos = section["stride"], section["seed"], bos_of(tokenizer, section["bos"])
    contexts = [n - len(bos) for n in section["context_tokens"]]
    needed = max(contexts) + 1 + stride
    there = books(section, needed + stride * ((section["windows_per_book"] or 1) - 1) + len(bos))
    names = list(there)
    bins: list[list[Row]] = [[] for _ in contexts]
    taken, short, longest = [], [], 0
    for i in choose(names, [""] * len(names), len(names), seed):
        if len(taken) == section["books"]:
            break
        ids = tokenizer(there[names[i]](), add_special_tokens=False, verbose=False)["input_ids"]
        begins = starts(len(ids), contexts, stride)
        longest = max(longest, len(ids))
        if not begins:
            short.append(names[i])
            continue
        taken.append(names[i])
        numbers = [f"{names[i]}/{number}" for number in range(len(begins))]
        drawn = choose(numbers, [""] * len(numbers), section["windows_per_book"] or len(numbers), seed)
        for number in sorted(drawn):
            identity = {"corpus": section["corpus"], "book_id": names[i], "window": number}
            for b, row in enumerate(windows_of(ids, begins[number], contexts, stride, bos)):
                bins[b].append(identity | {"bin": b} | row)
    if not taken:
        raise UserError(
            f"perplexity.context_tokens: a window needs {needed} tokens of a book, but the longest of "
            f"{len(names)} has {longest}; lower it, or perplexity.stride"
        )
    return bins, {"books": taken, "too_short": short, "bos": bool(bos)}


def write(spec: Mapping[str, Any], outputs: Sequence[str]) -> None:
    """Write a table of windows for each length bin. Raises UserError as `cut` does."""
    section, model = spec["perplexity"], spec["model"]
    tokenizer = load_tokenizer(model["name"], model.get("revision"))
    bins, about = cut(section, tokenizer)
    if about["too_short"]:
        print(f"{len(about['too_short'])} books are too short for one window", file=sys.stderr)
    source = hub_repository(section)
    facts = about | {
        "corpus": section["corpus"],
        "source": section["path"] if source is None else "@".join(source),
        "split": section["split"],
        "stride": section["stride"],
        "model": model["name"],
        "tokenizer_sha256": tokenizer_sha256(tokenizer),
    }
    for output, rows in zip(outputs, bins, strict=True):
        provenance.write_table(output, provenance.rows_to_table(rows, tables.WINDOWS), facts)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--spec", type=json.loads, required=True)
    parser.add_argument("--output", nargs="+", required=True, help="a file for each length bin")
    arguments = parser.parse_args(argv)
    return status(write, arguments.spec, arguments.output)


if __name__ == "__main__":
    sys.exit(main())
