"""Books for the perplexity studies on a real language model: PG-19's, and the books in LongBench's narrativeqa.

    python benchmarks/real_books.py OUT --pg19 BOOKS --narrativeqa narrativeqa.jsonl.gz

Writes one text file a book to the folder OUT: the files of the folder BOOKS as they are, and each text of Project
Gutenberg that a record of narrativeqa has as its context. (Its other texts are screenplays.) Records about the same
book give one file, which is named after the first of them.
"""

from __future__ import annotations

import argparse
import gzip
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

from kv_transition.studies.perplexity import pg19


def novels(records: Path) -> Iterator[tuple[str, str]]:
    """Yield the name and the text of each book."""
    seen: set[str] = set()
    with gzip.open(records, "rt", encoding="utf-8") as lines:
        for record in map(json.loads, lines):
            text = record["context"]
            # only Project Gutenberg's texts begin with their producers, which cleaning removes
            of_gutenberg = not text.lstrip().startswith(pg19.clean(text).lstrip()[:100])
            if of_gutenberg and text not in seen:
                seen.add(text)
                yield f"narrativeqa-{record['_id'][:8]}", text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--pg19", type=Path, required=True, help="folder of .txt or .txt.gz files")
    parser.add_argument("--narrativeqa", type=Path, required=True, help="LongBench's narrativeqa, .jsonl.gz")
    given = parser.parse_args()
    given.output.mkdir(parents=True, exist_ok=True)
    for book in sorted([*given.pg19.glob("*.txt"), *given.pg19.glob("*.txt.gz")]):
        shutil.copyfile(book, given.output / book.name)
    for name, text in novels(given.narrativeqa):
        (given.output / f"{name}.txt.gz").write_bytes(gzip.compress(text.encode(), mtime=0))
    print(f"{len(list(given.output.glob('*.txt*')))} books")


if __name__ == "__main__":
    main()
