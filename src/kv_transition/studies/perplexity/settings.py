"""The configuration keys of the perplexity study."""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from kv_transition.sections import Name, Section, Seed


class Perplexity(Section):
    """Text that is scored token by token from a compressed cache."""

    corpus: Literal["text", "pg19", "synthetic"] = Field("text", description="kind of the books")
    path: str | None = Field(None, description="text, pg19: a local file or folder, or a hub repository owner/name")
    revision: str | None = Field(
        None, description="commit (40 hex digits) of the hub repository; a hub repository needs it"
    )
    split: str = Field("test", description="split of the hub repository; of the synthetic documents: test or train")
    text_field: str = Field("text", min_length=1, description="Parquet, JSONL: the column with a book's text")
    book_field: str | None = Field(
        None, min_length=1, description="Parquet, JSONL: the column with a book's name; null: a hash of its text"
    )
    context_tokens: list[Annotated[int, Field(ge=2, le=100_000_000)]] = Field(
        [1024],
        min_length=1,
        description="numbers of context tokens before the scored tokens, in increasing order: one length bin each",
    )
    stride: int = Field(256, ge=1, le=100_000_000, description="tokens scored in each window")
    books: Annotated[int, Field(ge=1, le=100_000)] | None = Field(
        None, description="number of books, drawn at random; null: all"
    )
    windows_per_book: Annotated[int, Field(ge=1, le=100_000)] | None = Field(
        None, description="number of windows of each book, drawn at random; null: all"
    )
    bos: Literal["auto", "never"] = Field(
        "auto",
        description="auto: each context begins with the token that the tokenizer puts before a text; none: without it",
    )
    streaming: bool = Field(False, description="true: the policy acts from the first token of the context on")
    streaming_chunk: int = Field(1, ge=1, description="streaming: number of context tokens that are read at a time")
    policies: list[Name] | None = Field(
        None, min_length=1, description="names of kv.policies; null: all. full is always included"
    )
    seed: Seed = Field(0, description="seed of books, windows and random policies")

    @field_validator("context_tokens")
    @classmethod
    def _rising(cls, lengths: list[int]) -> list[int]:
        if any(a >= b for a, b in pairwise(lengths)):
            raise ValueError(f"lengths must be in increasing order, not {lengths}")
        return lengths

    @model_validator(mode="after")
    def _complete(self) -> Perplexity:
        if self.policies is not None and len(set(self.policies)) < len(self.policies):
            raise ValueError(f"policies: a name is listed twice in {', '.join(self.policies)}; give each once")
        if self.corpus != "synthetic" and self.path is None:
            raise ValueError(
                f"path: {self.corpus} needs a file or folder of .txt, .txt.gz, .jsonl, .jsonl.gz or .parquet, or a hub "
                "repository owner/name"
            )
        if self.corpus == "synthetic" and not (self.books and self.windows_per_book):
            raise ValueError("books: synthetic needs books (such as 10) and windows_per_book (such as 4)")
        return self


class Fields(Section):
    """The keys that perplexity adds to an experiment."""

    perplexity: Perplexity | None = None
