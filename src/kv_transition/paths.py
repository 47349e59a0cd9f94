"""Every path under the results directory, for the library and the rules.

The functions take plain strings, so that Snakemake can pass wildcards: ``paths.cell("{task}", ...)``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

TASK = r"[a-z0-9_]+"
MODE = r"before_question|after_prompt"
POLICY = r"[A-Za-z0-9_.-]+"
BUDGET = r"r[0-9.]+|t[0-9]+"
BIN = r"[0-9]+"
SHARD = r"[0-9]+"
LOOK = r"[0-9]+"
CORPUS = r"text|pg19|synthetic"


@dataclass(frozen=True)
class Paths:
    """The files of one experiment under ``{results}/{experiment}/``; stored prefills are shared by all experiments."""

    results: str
    experiment: str

    @property
    def root(self) -> str:
        return f"{self.results}/{self.experiment}"

    @property
    def prefill_store(self) -> str:
        return f"{self.results}/prefill"

    @property
    def models(self) -> str:
        """Return the folder of models that were dequantized from GGUF files, shared by all experiments."""
        return f"{self.results}/models"

    def table(self, name: str) -> str:
        """Return the path of a table of the experiment, such as scores, bin_stats, comparisons or transition."""
        return f"{self.root}/{name}.parquet"

    def file(self, name: str) -> str:
        return f"{self.root}/{name}"

    def plot(self, name: str, ext: str) -> str:
        return f"{self.root}/plots/{name}.{ext}"

    def source(self, task: str) -> str:
        return f"{self.root}/data/{task}/source.parquet"

    def examples(self, task: str) -> str:
        return f"{self.root}/data/{task}/examples.parquet"

    def manifest(self, task: str) -> str:
        return f"{self.root}/data/{task}/manifest.json"

    def bin(self, task: str, bin: int | str) -> str:
        return f"{self.root}/data/{task}/bin{bin}.parquet"

    def prefill_index(self, task: str, bin: int | str) -> str:
        return f"{self.root}/prefill/{task}/bin{bin}.json"

    def cell(self, task: str, mode: str, policy: str, budget: str, bin: int | str) -> str:
        return f"{self.root}/cells/{task}/{mode}/{policy}/{budget}/bin{bin}.parquet"

    def shard(self, number: int | str) -> Paths:
        """Return the paths of one shard (a part of every bin, for adaptive allocation), laid out as those of an
        experiment.
        """
        return Paths(self.results, f"{self.experiment}/shards/{number}")

    def bin_scores(self, task: str, bin: int | str) -> str:
        return f"{self.root}/scores/{task}/bin{bin}.parquet"

    def allocation(self, look: int | str) -> str:
        return f"{self.root}/allocation/look{look}.parquet"

    def observations(self, task: str, bin: int | str) -> str:
        return f"{self.root}/observations/{task}/bin{bin}.parquet"

    def observation_layers(self, task: str, bin: int | str) -> str:
        return f"{self.root}/observations/{task}/layers_bin{bin}.parquet"

    def observation_checks(self, task: str) -> str:
        return f"{self.root}/observations/{task}/checks.parquet"

    def observation_logs(self, task: str) -> str:
        """Return the folder of the observations in the layout of the recall study."""
        return f"{self.root}/observations/{task}/logs"

    def windows(self, corpus: str, bin: int | str) -> str:
        return f"{self.root}/perplexity/{corpus}/windows_bin{bin}.parquet"

    def perplexity(self, corpus: str, policy: str, budget: str, bin: int | str) -> str:
        return f"{self.root}/perplexity/{corpus}/{policy}/{budget}/bin{bin}.parquet"

    def conversations(self, chat_set: str) -> str:
        return f"{self.root}/chat/{chat_set}/conversations.parquet"

    def chat(self, chat_set: str, policy: str, budget: str) -> str:
        return f"{self.root}/chat/{chat_set}/{policy}/{budget}.parquet"

    def chat_layers(self, chat_set: str, policy: str, budget: str) -> str:
        return f"{self.root}/chat/{chat_set}/{policy}/{budget}.layers.parquet"

    def harness(self, mode: str, policy: str, budget: str) -> str:
        return f"{self.root}/harness/{mode}/{policy}/{budget}.parquet"

    def log(self, *parts: str) -> str:
        return "/".join((self.root, "logs", *parts)) + ".log"


_CELL = re.compile(
    rf"/cells/(?P<task>{TASK})/(?P<mode>{MODE})/(?P<policy>{POLICY})/(?P<budget>{BUDGET})/bin(?P<bin>{BIN})\.parquet$"
)


def cell_key(path: str) -> dict[str, str]:
    """Return the task, mode, policy, budget and bin in the path of a cell.

    Raises ValueError if the path is not that of a cell.
    """
    match = _CELL.search(path)
    if match is None:
        raise ValueError(f"{path} is not the path of a cell")
    return match.groupdict()
