"""The configuration keys of the grid: documents, length bins, adaptive allocation."""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from kv_transition.errors import shown
from kv_transition.sections import Section, Seed, Task


class Dataset(Section):
    """The source of the examples."""

    name: Literal["synthetic", "ruler", "longbench", "longbench_v2", "infinitebench", "math", "ifeval", "jsonl"] = (
        Field("synthetic", description="loader of the examples")
    )
    tasks: list[Task] = Field(["reader_qa"], min_length=1, description="tasks of the data set")
    revision: str | None = Field(
        None, description="commit (40 hex digits) of the hub repository; required when it is downloaded"
    )
    path: str | None = Field(None, description="local folder or file; longbench also takes a hub repository owner/name")
    split: str = Field("test", description="split of the data set")
    prompts: str | None = Field(None, description="LongBench's dataset2prompt.json")
    max_lengths: str | None = Field(None, description="LongBench's dataset2maxlen.json")
    lengths: list[Annotated[int, Field(ge=64, le=10_000_000)]] | None = Field(
        None, description="synthetic, ruler: sizes in tokens"
    )
    n_per_length: Annotated[int, Field(ge=1, le=100_000)] | None = Field(
        None, description="synthetic, ruler: number of examples of each length"
    )
    seed: Seed = Field(0, description="synthetic, ruler: seed of the documents")

    @model_validator(mode="after")
    def _complete(self) -> Dataset:
        if len(set(self.tasks)) < len(self.tasks):
            raise ValueError("tasks: a task is listed twice; name each once")
        if self.lengths and len(set(self.lengths)) < len(self.lengths):
            raise ValueError(f"lengths: {shown(self.lengths)} lists a length twice; name each once")
        if self.name in ("synthetic", "ruler") and not (self.lengths and self.n_per_length):
            raise ValueError(f"lengths: {self.name} needs lengths (such as [256, 512]) and n_per_length (such as 40)")
        if self.name in ("longbench_v2", "infinitebench", "math", "ifeval") and not self.path:
            raise ValueError(
                f"path: {self.name} needs the benchmark's file, its folder, or a hub repository owner/name"
            )
        if self.name == "jsonl" and not self.path:
            raise ValueError("path: jsonl needs the .jsonl file or the folder that contains {task}.jsonl")
        return self


class Binning(Section):
    """Length bins on the untruncated prompt tokens."""

    n_bins: int = Field(5, ge=1, le=50, description="number of length bins")
    edges: list[Annotated[int, Field(ge=0)]] | None = Field(None, description="n_bins + 1 edges; null: quantiles")
    n_per_bin: int = Field(20, ge=1, le=100_000, description="number of examples chosen in each bin")
    strict: bool = Field(False, description="stop when a bin has fewer examples than n_per_bin")
    seed: Seed = Field(0, description="seed of the choice")

    @field_validator("edges")
    @classmethod
    def _rising(cls, edges: list[int] | None) -> list[int] | None:
        if edges is not None and any(a >= b for a, b in pairwise(edges)):
            raise ValueError(f"edges must rise from each to the next, not {edges}")
        return edges

    @model_validator(mode="after")
    def _count(self) -> Binning:
        if self.edges is not None and len(self.edges) != self.n_bins + 1:
            raise ValueError(f"edges: give n_bins + 1 = {self.n_bins + 1} numbers, not {len(self.edges)}")
        return self


class Adaptive(Section):
    """Adaptive allocation: further examples only for bins in which the transition is undecided."""

    enabled: bool = Field(False, description="true: shards of examples are added to a bin while it is undecided")
    start: int = Field(5, ge=1, le=100_000, description="examples in each bin at the first look")
    step: int = Field(5, ge=1, le=100_000, description="examples that an undecided bin gets at each later look")
    cap: int = Field(
        40, ge=1, le=100_000, description="largest number of examples in a bin; determines the looks and their levels"
    )

    @model_validator(mode="after")
    def _room(self) -> Adaptive:
        if self.start > self.cap:
            raise ValueError(f"start: {self.start} is more than cap, {self.cap}; give at most the value of cap")
        return self

    @property
    def shards(self) -> list[tuple[int, int]]:
        """Return start and end of each shard in a bin's order of choice; there are as many shards as looks."""
        ends = [*range(self.start, self.cap, self.step), self.cap]
        return list(pairwise([0, *ends]))


class Fields(Section):
    """The keys that the grid adds to an experiment."""

    dataset: Dataset | None = None
    binning: Binning = Binning()
    adaptive: Adaptive = Adaptive()

    @property
    def tasks(self) -> list[str]:
        """Return the tasks that are answered; none in an experiment with perplexity or conversations only."""
        return self.dataset.tasks if self.dataset else []

    @field_validator("adaptive")
    @classmethod
    def _enough_chosen(cls, adaptive: Adaptive, info: ValidationInfo) -> Adaptive:
        chosen = info.data["binning"].n_per_bin if "binning" in info.data else adaptive.cap
        if adaptive.enabled and adaptive.cap > chosen:
            raise ValueError(
                f"cap: {adaptive.cap} is more than the {chosen} examples that binning.n_per_bin chooses in a bin; "
                "raise binning.n_per_bin or lower cap"
            )
        return adaptive
