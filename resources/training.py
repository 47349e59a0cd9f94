"""What the training of both embedded models shares: rows, curriculum, training loop, checkpoints, export.

A model's own ``train.py`` describes it as a `Recipe` and calls `main`. Both models (``network.py``) have a word-level
vocabulary and learn to look things up in their context. Each part below is needed for that:

* Layer 0 starts with previous-token heads, set through the biases of its query and key projections. A look-up composes
  "this word follows the name" with "I want what follows the name". If the first half is left to chance, it takes longer
  to appear than the whole run.
* Training starts with short rows of bare statements in two different orders. Nearly every word of the second half can
  be recalled from the first. This is the dense supervision that builds the look-up circuit; questions on whole
  documents or conversations alone are too sparse.
* A curriculum then makes rows longer each time the accuracy at the current size is high enough.
* A final phase at full size lowers the learning rate to 5 %.

Rows, curriculum and learning rate depend on the seed and the step number only, never on the clock, so that the seed
determines the run. Each step has its own random generators, so that a resumed run continues exactly.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import ClassVar

import torch
import torch.distributed as dist
from network import EOS, PAD, build_model, build_optimizers, model_config
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

CONTEXT = "context"
"""the role of words that are not supervised"""

LEARNING_RATE = 2e-3
FINAL_LEARNING_RATE_SHARE = 0.05
LOG_STEPS = 25


@dataclass
class Row:
    """A training sequence: words, and for each the index in ``ROLES`` of what it is supervised as (0: nothing)."""

    ROLES: ClassVar[tuple[str, ...]] = (CONTEXT,)

    words: list[str] = field(default_factory=lambda: ["<bos>"])
    roles: list[int] = field(default_factory=lambda: [0])

    def add(self, words: Iterable[str], role: str = CONTEXT) -> None:
        """Append words that share a role."""
        before = len(self.words)
        self.words.extend(words)
        self.roles.extend([self.ROLES.index(role)] * (len(self.words) - before))


def collate(rows: Sequence[Row], word_id: Mapping[str, int]) -> tuple[Tensor, Tensor]:
    """Return token ids and roles, both int64 of shape (rows, longest row), padded on the right."""
    width = max(len(row.words) for row in rows)
    ids = torch.full((len(rows), width), PAD)
    roles = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, : len(row.words)] = torch.tensor([word_id[word] for word in row.words])
        roles[i, : len(row.roles)] = torch.tensor(row.roles)
    return ids, roles


@dataclass
class Curriculum:
    """The state of a run's schedule: which rows come next, when to advance, what the learning rate is.

    All processes hold equal copies, because they update them with the same summed counts. A recipe's subclass sets the
    class attributes and defines `batch` and `measured`.
    """

    SIZES: ClassVar[tuple[int, ...]]
    UNIT: ClassVar[str]  # what a size counts
    ADVANCE_ACCURACY: ClassVar[float]
    WARM_UP_STEPS: ClassVar[int]
    MIN_STAGE_STEPS: ClassVar[int] = 60
    MAX_STAGE_STEPS: ClassVar[int]  # then go on to the next size all the same
    FINAL_STEPS: ClassVar[int] = 800

    stage: int = 0  # index into SIZES; len(SIZES) is the final phase
    stage_steps: int = 0
    accuracy: dict[str, float] = field(default_factory=dict)  # running means at the current size, by role

    def batch(self, name: str, rank: int) -> tuple[list[Row], bool]:
        """Return one process's rows of a step, and whether they are of the current size.

        name: of the seed and the step; random generators are seeded with it.
        """
        raise NotImplementedError

    def measured(self) -> tuple[str, ...]:
        """Return the roles whose accuracies decide about the next size."""
        raise NotImplementedError

    def must_be_learned(self) -> bool:
        """Return whether the run fails if the current size is not learned in MAX_STAGE_STEPS."""
        return self.stage == 0

    def rate_factor(self) -> float:
        """Return what the learning rate is multiplied by at the current size."""
        return 1.0

    @property
    def size(self) -> int:
        """The current size; in the final phase the largest one."""
        return self.SIZES[min(self.stage, len(self.SIZES) - 1)]

    @property
    def final(self) -> bool:
        """Whether the curriculum is over."""
        return self.stage == len(self.SIZES)

    @property
    def finished(self) -> bool:
        """Whether the run is over."""
        return self.final and self.stage_steps >= self.FINAL_STEPS

    def learning_rate(self, step: int) -> float:
        """Return the rate of AdamW: linear warm-up, then constant; in the final phase it falls linearly to 5 %."""
        rate = LEARNING_RATE * min(1.0, (step + 1) / self.WARM_UP_STEPS) * self.rate_factor()
        if self.final:
            rate *= 1.0 - (1.0 - FINAL_LEARNING_RATE_SHARE) * self.stage_steps / self.FINAL_STEPS
        return rate

    def update(self, correct: Mapping[str, float], count: Mapping[str, float], current: bool) -> bool:
        """Add the counts of one step and return whether a new stage begins.

        Raises:
            RuntimeError: bare statements are not learned, so that longer rows will not be either.
        """
        self.stage_steps += 1
        if current:
            for role, n in count.items():
                if n:
                    share = correct[role] / n
                    self.accuracy[role] = share + 0.95 * (self.accuracy.get(role, share) - share)
        if self.final:
            return False
        learned = min(self.accuracy.get(role, 0.0) for role in self.measured()) > self.ADVANCE_ACCURACY
        over = self.stage_steps >= self.MAX_STAGE_STEPS
        if over and not learned and self.must_be_learned():
            raise RuntimeError(
                f"{self.UNIT} {self.size} is not learned after {self.MAX_STAGE_STEPS} steps: {self.accuracy}"
            )
        if (learned and self.stage_steps >= self.MIN_STAGE_STEPS) or over:
            self.stage, self.stage_steps, self.accuracy = self.stage + 1, 0, {}
            return True
        return False


@dataclass(frozen=True)
class Recipe:
    """Everything in which one embedded model differs from the other."""

    folder: Path
    vocabulary: Sequence[str]  # the special tokens first: PAD, BOS, EOS, UNK
    max_position_embeddings: int
    row: type[Row]
    curriculum: type[Curriculum]
    tokenizer: Callable[[], PreTrainedTokenizerFast]
    processes: int = 1
    """each draws rows of its own and they average their gradients: on two cores faster than two threads"""
    checkpoint_steps: int = 100
    context_loss_weight: float = 0.0
    context_loss_share: float = 0.0
    """share of the unsupervised words, drawn at random, that the context loss falls on"""

    @property
    def config(self) -> Qwen2Config:
        return model_config(len(self.vocabulary), self.max_position_embeddings)


def losses(
    model: Qwen2ForCausalLM, ids: Tensor, roles: Tensor, recipe: Recipe, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the loss and two counts by role: supervised words predicted right, and supervised words.

    ``ids`` and ``roles`` are int64 of shape (rows, tokens), the counts float of shape (roles,). ``generator`` draws
    which words of the context bear loss. Logits are computed only where a loss needs them.
    """
    hidden = model.model(input_ids=ids[:, :-1], use_cache=False).last_hidden_state
    targets, roles = ids[:, 1:], roles[:, 1:]
    supervised = roles > 0
    logits, wanted, role = model.lm_head(hidden[supervised]), targets[supervised], roles[supervised]
    loss = cross_entropy(logits, wanted)
    if recipe.context_loss_weight:
        drawn = torch.rand(targets.shape, generator=generator) < recipe.context_loss_share
        context = ~supervised & (targets != PAD) & drawn
        loss = loss + recipe.context_loss_weight * cross_entropy(model.lm_head(hidden[context]), targets[context])
    words = wanted != EOS  # stopping is easy and would flatter the accuracy
    right = (logits.argmax(-1) == wanted) & words
    n_roles = len(recipe.row.ROLES)
    correct = torch.bincount(role[right], minlength=n_roles).float()
    return loss, correct, torch.bincount(role[words], minlength=n_roles).float()


class Run:
    """A training run of one process: model, optimisers, curriculum, and how far it has come."""

    def __init__(self, recipe: Recipe, seed: int, rank: int = 0):
        self.recipe, self.seed, self.rank = recipe, seed, rank
        self.model = build_model(seed, recipe.config)
        self.parameters = list(self.model.parameters())
        self.optimizers = build_optimizers(self.model)
        self.curriculum = recipe.curriculum()
        self.word_id = {word: i for i, word in enumerate(recipe.vocabulary)}
        self.steps = self.tokens = 0
        self.start, self.start_cpu = time.perf_counter(), time.process_time()

    def step(self) -> tuple[float, bool]:
        """Train one step. Return the loss, the mean over the processes, and whether a new stage begins."""
        name = f"{self.seed}/{self.steps}"
        rows, current = self.curriculum.batch(name, self.rank)
        ids, roles = collate(rows, self.word_id)
        generator = torch.Generator().manual_seed(random.Random(f"{name}/{self.rank}/context").getrandbits(48))
        loss, correct, count = losses(self.model, ids, roles, self.recipe, generator)
        self.model.zero_grad()
        loss.backward()
        extra = torch.cat([correct, count, torch.tensor([loss.item(), float(ids.numel())])])
        if self.recipe.processes > 1:
            extra = average_gradients(self.parameters, extra)
        names = self.recipe.row.ROLES
        correct, count = (dict(zip(names, part.tolist(), strict=True)) for part in extra[:-2].chunk(2))
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        rate = self.curriculum.learning_rate(self.steps)
        for optimizer, factor in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = factor * rate
            optimizer.step()
        self.tokens += int(extra[-1])
        self.steps += 1
        return float(extra[-2]) / self.recipe.processes, self.curriculum.update(correct, count, current)

    def save(self, path: Path) -> None:
        """Write everything that a resumed run needs; a crash leaves the previous checkpoint."""
        state = {
            "seed": self.seed,
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer, _ in self.optimizers],
            "schedule": asdict(self.curriculum),
            "step": self.steps,
            "tokens": self.tokens,
            "seconds": time.perf_counter() - self.start,
            "cpu_seconds": time.process_time() - self.start_cpu,  # of this process
        }
        partial = path.with_suffix(".partial")
        torch.save(state, partial)
        partial.replace(path)

    def load(self, path: Path) -> None:
        """Continue from a checkpoint."""
        checkpoint = torch.load(path, weights_only=True)
        if checkpoint["seed"] != self.seed:
            raise SystemExit(f"the checkpoint was made with seed {checkpoint['seed']}, not {self.seed}")
        self.model.load_state_dict(checkpoint["model"])
        for (optimizer, _), state in zip(self.optimizers, checkpoint["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        self.curriculum = self.recipe.curriculum(**checkpoint["schedule"])
        self.steps, self.tokens = checkpoint["step"], checkpoint["tokens"]
        self.start -= checkpoint["seconds"]
        self.start_cpu -= checkpoint["cpu_seconds"]

    def report(self, loss: float, accuracy: Mapping[str, float], stage: str) -> None:
        """Print one line about the step that has just ended."""
        shares = " ".join(f"{role} {share:.3f}" for role, share in sorted(accuracy.items()))
        minutes, cpu = (time.perf_counter() - self.start) / 60, (time.process_time() - self.start_cpu) / 60
        print(
            f"step {self.steps} {self.curriculum.UNIT} {stage} tokens {self.tokens} minutes {minutes:.1f}"
            f" cpu {cpu:.1f} loss {loss:.3f} | {shares}",
            flush=True,
        )


def average_gradients(parameters: list[Tensor], extra: Tensor) -> Tensor:
    """Average the gradients over the processes in place and return the sum of ``extra`` (1-d) over them."""
    flat = torch.cat([parameter.grad.flatten() for parameter in parameters] + [extra])
    dist.all_reduce(flat)
    offset = 0
    for parameter in parameters:
        parameter.grad.copy_(flat[offset : offset + parameter.numel()].view_as(parameter)).div_(dist.get_world_size())
        offset += parameter.numel()
    return flat[offset:]


def train(rank: int, recipe: Recipe, seed: int, checkpoint: Path, resume: bool, rendezvous: str = "") -> None:
    """Run one training process to its end. The first process writes the log and the checkpoints.

    rendezvous: a file through which several processes find each other.
    """
    torch.set_num_threads(1)
    if recipe.processes > 1:
        dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=recipe.processes)
    run = Run(recipe, seed, rank)
    if resume:
        run.load(checkpoint)
    while not run.curriculum.finished:
        stage = "final" if run.curriculum.final else str(run.curriculum.size)
        accuracy = run.curriculum.accuracy
        loss, advanced = run.step()
        over = run.curriculum.finished
        if rank == 0 and (run.steps % LOG_STEPS == 0 or advanced or over):
            run.report(loss, accuracy, stage)
        if rank == 0 and (run.steps % recipe.checkpoint_steps == 0 or over):
            run.save(checkpoint)
    if recipe.processes > 1:
        dist.destroy_process_group()


def export(recipe: Recipe, checkpoint_path: Path, folder: Path) -> None:
    """Write a checkpoint as a Hugging Face model in fp16, with a record of the run, to ``folder``.

    The tokenizer goes to a folder of its own. Next to a ``config.json`` that says qwen2, AutoTokenizer would load it as
    the byte-pair tokenizer of Qwen2 and return wrong ids without an error.
    """
    checkpoint = torch.load(checkpoint_path, weights_only=True)
    model = Qwen2ForCausalLM(recipe.config)
    model.load_state_dict(checkpoint["model"])
    model.generation_config.do_sample = False
    model.to(torch.float16).save_pretrained(folder)
    recipe.tokenizer().save_pretrained(folder / "tokenizer")
    record = {
        "seed": checkpoint["seed"],
        "steps": checkpoint["step"],
        "tokens": checkpoint["tokens"],
        "parameters": model.num_parameters(),
        "wall_minutes": round(checkpoint["seconds"] / 60, 1),
        "cpu_minutes_per_process": round(checkpoint["cpu_seconds"] / 60, 1),
        "processes": recipe.processes,
    }
    (folder / "training.json").write_text(json.dumps(record, indent=2) + "\n")
    print(f"exported step {checkpoint['step']} to {folder}: {record}")


def main(recipe: Recipe, description: str) -> None:
    """Run a recipe's command line: train, resume, export."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=recipe.folder, help="where the model is written")
    parser.add_argument("--work", type=Path, help="where checkpoints are kept (default: a temporary folder)")
    parser.add_argument("--resume", action="store_true", help="continue from the checkpoint in --work")
    parser.add_argument("--export-only", action="store_true", help="export the checkpoint in --work, do not train")
    arguments = parser.parse_args()
    if arguments.work is None:
        if arguments.resume or arguments.export_only:
            parser.error("--resume and --export-only need --work")
        arguments.work = Path(tempfile.gettempdir()) / recipe.folder.name
    arguments.work.mkdir(parents=True, exist_ok=True)
    checkpoint = arguments.work / "checkpoint.pt"
    if not arguments.export_only:
        _start(recipe, arguments.seed, checkpoint, arguments.resume)
    export(recipe, checkpoint, arguments.out)


def _start(recipe: Recipe, seed: int, checkpoint: Path, resume: bool) -> None:
    if recipe.processes == 1:
        train(0, recipe, seed, checkpoint, resume)
        return
    # glibc returns large freed blocks to the system and faults them in again at every step; let the processes, which
    # read this when they start, keep them.
    os.environ |= {
        "MALLOC_MMAP_MAX_": "0",
        "MALLOC_TRIM_THRESHOLD_": str(10**11),
        "MALLOC_TOP_PAD_": str(10**8),
        "OMP_NUM_THREADS": "1",
    }
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    with tempfile.TemporaryDirectory() as folder:
        arguments = (recipe, seed, checkpoint, resume, str(Path(folder) / "rendezvous"))
        torch.multiprocessing.spawn(train, arguments, nprocs=recipe.processes)
