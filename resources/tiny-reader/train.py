"""Train the tiny reader from scratch: one command, one seed, CPU only.

    python resources/tiny-reader/train.py

The reader is a four-layer Qwen2 model with a word-level vocabulary. It is trained on documents of the
``train`` split of ``kv_transition.data.synthetic`` and written to this script's folder. What makes such a
small model learn to look things up in its context (each is needed):

* Layer 0 starts with previous-token heads, set through the biases of its query and key projections. A
  look-up composes "this word follows the name" with "I want what follows the name"; left to chance, the
  first half takes longer to appear than the whole run.
* Training starts with short rows of bare facts stated twice in different order. Nearly every word of the
  second half can be recalled from the first, which is dense supervision for the look-up circuit; questions
  on documents alone are too sparse to build it.
* A curriculum then doubles the row length each time the accuracy at the current length is high enough.
* A final phase at full length lowers the learning rate to 5 %.

Rows pack one document and many questions. The loss falls on answers, on words of names that the row has
already shown, and lightly on a random share of all other words.

Two processes with one thread each take their own rows and average their gradients; this is faster on two
cores than one process with two threads. Rows, curriculum and learning rate depend on the seed and the step
number only, never on the clock, so that the seed determines the run.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from kv_transition.data import synthetic, world

HERE = Path(__file__).resolve().parent

PAD, BOS, EOS, UNK = range(4)
WORD_ID = {word: i for i, word in enumerate(world.VOCABULARY)}

# ----------------------------------------------------------------------------------------------------
# Configuration.

PROCESSES = 2
TOKENS_PER_STEP = 2048  # per process; a row longer than this is a batch of its own
ROW_LENGTHS = (64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096)
FACT_ROW_LENGTH = 96  # rows up to this length hold bare facts and no document
CURRICULUM = (64, 96, 256, 512, 1024, 2048, 4096)
CURRENT_LENGTH_SHARE = 0.5  # share of steps at the current length; the others revisit shorter rows
ADVANCE_ACCURACY = 0.93
MIN_STAGE_STEPS = 60
MAX_STAGE_STEPS = 500  # then go on to the next length all the same
FINAL_STEPS = 800
FINAL_DOCUMENT_TOKENS = (3072, 4084)
FINAL_QUESTIONS = 28
FINAL_LENGTH_SHARE = 0.7  # share of steps on documents of the final size; the others revisit shorter rows

LEARNING_RATE = 2e-3  # AdamW: embeddings, norms and biases
MUON_FACTOR = 5.0  # Muon: matrices
FINAL_LEARNING_RATE_SHARE = 0.05
WARM_UP_STEPS = 100
CONTEXT_LOSS_WEIGHT = 0.1
CONTEXT_LOSS_SHARE = 0.15

# How often a row holds bare facts, and how often each kind of question is asked on a document. A completion
# is the beginning of a stated fact ("Recall : Rina Hovis lives in").
CURRICULUM_MIX = {"facts": 0.0, "completion": 0.27, "one_hop": 0.43, "chain": 0.20, "unanswerable": 0.10}
FINAL_MIX = {"facts": 0.01, "completion": 0.05, "one_hop": 0.48, "chain": 0.28, "unanswerable": 0.18}

EMBEDDING_STD = 0.08
PREVIOUS_TOKEN_GAIN = 4.5
CHECKPOINT_STEPS = 250
LOG_STEPS = 25


def model_config() -> Qwen2Config:
    """Return the architecture: 0.8 million parameters, a quarter of them embeddings."""
    return Qwen2Config(
        vocab_size=len(world.VOCABULARY),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
        rms_norm_eps=1e-6,
        tie_word_embeddings=True,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )


# ----------------------------------------------------------------------------------------------------
# Rows.

# What a word is supervised as. Zero is the context, which bears only the light language-modelling loss.
ROLES = ("context", "name", "recall", "completion", "one_hop", "chain", "unanswerable")
ROLE_ID = {role: i for i, role in enumerate(ROLES)}


@dataclass
class Row:
    """A training sequence: words and, for each, the role (a key of ``ROLE_ID``) it is supervised in."""

    words: list[str] = field(default_factory=lambda: [world.SPECIAL_TOKENS[BOS]])
    roles: list[int] = field(default_factory=lambda: [0])

    def add(self, words: Sequence[str], role: str = "context") -> None:
        """Append words that share a role."""
        self.words.extend(words)
        self.roles.extend([ROLE_ID[role]] * len(words))


def repeated_names_row(rng: random.Random, n_tokens: int) -> Row:
    """Make a row of different names, then the same cycle of names from another start."""
    everything = world.FIRST_NAMES + world.SURNAMES + world.ORGANISATION_NAMES + world.CITY_NAMES
    pool = rng.choice((world.FIRST_NAMES, world.SURNAMES, world.ORGANISATION_NAMES, world.CITY_NAMES, everything))
    names = rng.sample(pool, min(n_tokens // 2 - 2, len(pool)))
    start = rng.randrange(len(names))
    row = Row()
    row.add(names)
    row.add(("Recall", ":", names[start]))
    for i in range(start + 1, start + len(names)):
        # The successor of the last name was never shown.
        row.add([names[i % len(names)]], "name" if i % len(names) else "context")
    return row


def repeated_facts_row(rng: random.Random, n_tokens: int) -> Row:
    """Make a row of facts about different names, then the same facts in another order."""
    n_facts = min(150, max(2, (n_tokens - 3) // 16))
    surnames = rng.sample(world.SURNAMES, n_facts)
    organisations = rng.sample(world.ORGANISATION_NAMES, n_facts)
    cities = rng.sample(world.CITY_NAMES, n_facts)
    relations = tuple(synthetic.RELATIONS)
    only = rng.choice(relations) if rng.random() < 0.6 else None
    facts = []
    for surname, organisation, city in zip(surnames, organisations, cities, strict=True):
        relation = only or rng.choice(relations)
        if synthetic.RELATIONS[relation].subject == "person":
            name = (rng.choice(world.FIRST_NAMES), surname)
        else:
            name = (organisation, world.organisation_type(rng))
        if relation == "employer":
            value = (rng.choice(world.ORGANISATION_NAMES), world.organisation_type(rng))
        elif relation == "job":
            value = world.job_title(rng)
        elif relation == "year":
            value = world.founding_year(rng)
        else:
            value = world.place_name(rng, city)
        facts.append((name, synthetic.RELATIONS[relation].statement, value))
    row = Row()
    for name, statement, value in facts:
        row.add((*name, *statement, *value, "."))
    row.add(("Recall", ":"))
    for name, statement, value in rng.sample(facts, n_facts):
        row.add(name[:1])
        row.add(name[1:], "name")
        row.add(statement)
        row.add(value, "recall")
        row.add(".")
    return row


def document_row(rng: random.Random, n_document_tokens: int, n_questions: int, mix: Mapping[str, float]) -> Row:
    """Make a row of a ``train`` document of about the given length and questions of random kinds on it."""
    # Many short documents have no filler: there is little room for facts as it is.
    filler = 0.0 if n_document_tokens < 256 and rng.random() < 0.6 else None
    document = synthetic.draw_document(rng, n_document_tokens, "train", filler)
    row = Row()
    row.add(document.words)
    for kind in rng.choices(tuple(mix), tuple(mix.values()), k=n_questions):
        relation = rng.choice(tuple(synthetic.RELATIONS))
        if kind == "completion":
            subject = synthetic.RELATIONS[relation].subject
            entity = rng.choice(document.persons if subject == "person" else document.organisations)
            name, answer = entity.name, entity.values[relation]
            prompt = ("Recall", ":", *name, *synthetic.RELATIONS[relation].statement)
        else:
            question = synthetic.ask(rng, document, kind, relation)
            name, answer = question.name, question.answer.split()
            prompt = synthetic.QUESTION_TEMPLATE.format(question=question.text).split()
        row.add(prompt)
        if kind != "unanswerable":
            # The second word of a name mostly follows from the first: more supervision for the same circuit.
            second = len(row.roles) - len(prompt) + prompt.index(name[0]) + 1
            row.roles[second] = ROLE_ID["name"]
        row.add([*answer, world.SPECIAL_TOKENS[EOS]], kind)
    return row


def make_row(rng: random.Random, n_tokens: int, mix: Mapping[str, float]) -> Row:
    """Make a row of about ``n_tokens`` tokens: facts if it is short or the mix says so, else a document."""
    if n_tokens <= FACT_ROW_LENGTH or rng.random() < mix["facts"]:
        return (repeated_names_row if rng.random() < 0.4 else repeated_facts_row)(rng, n_tokens)
    n_questions = max(4, min(32, n_tokens // 40))
    n_document_tokens = max(synthetic.MIN_DOCUMENT_TOKENS, n_tokens - 14 * n_questions)
    return document_row(rng, n_document_tokens, n_questions, {k: v for k, v in mix.items() if k != "facts"})


def collate(rows: list[Row]) -> tuple[Tensor, Tensor]:
    """Return token ids and roles, both int64 of shape (rows, longest row), padded on the right."""
    width = max(len(row.words) for row in rows)
    ids = torch.full((len(rows), width), PAD)
    roles = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, : len(row.words)] = torch.tensor([WORD_ID[word] for word in row.words])
        roles[i, : len(row.roles)] = torch.tensor(row.roles)
    return ids, roles


# ----------------------------------------------------------------------------------------------------
# Model and optimisers.


def build_model(seed: int, config: Qwen2Config | None = None) -> Qwen2ForCausalLM:
    """Make the model, or one of another ``config``, with its initial weights, which depend on the seed only."""
    config = config or model_config()
    model = Qwen2ForCausalLM(config)
    generator = torch.Generator().manual_seed(seed)
    residual_scale = 0.5 / math.sqrt(config.num_hidden_layers)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
            elif "embed_tokens" in name:
                parameter.normal_(0.0, EMBEDDING_STD, generator=generator)
            else:
                scale = residual_scale if "o_proj" in name or "down_proj" in name else 1.0
                parameter.normal_(0.0, scale / math.sqrt(parameter.shape[1]), generator=generator)
        set_previous_token_heads(model)
    return model


def set_previous_token_heads(model: Qwen2ForCausalLM) -> None:
    """Make head h of layer 0 look h + 1 tokens back, whatever the tokens are.

    A constant query and key score cos(theta * distance) on each rotary plane. Turning the query by
    theta * offset moves the peak from distance 0 to the offset; the three fastest planes make it sharp.
    """
    attention = model.model.layers[0].self_attn
    head_dim = model.config.head_dim
    planes = torch.arange(3)
    theta = model.config.rope_parameters["rope_theta"] ** (-2 * planes / head_dim)
    query_bias = attention.q_proj.bias.view(-1, head_dim)
    for head in range(len(query_bias)):
        angle = theta * (head + 1)
        query_bias[head, planes] = PREVIOUS_TOKEN_GAIN * torch.cos(angle)
        query_bias[head, planes + head_dim // 2] = -PREVIOUS_TOKEN_GAIN * torch.sin(angle)
    attention.k_proj.bias.view(-1, head_dim)[:, planes] = PREVIOUS_TOKEN_GAIN
    attention.q_proj.weight.mul_(0.3)  # content should not drown position
    attention.k_proj.weight.mul_(0.3)


def build_optimizers(model: Qwen2ForCausalLM) -> list[tuple[torch.optim.Optimizer, float]]:
    """Return (optimiser, learning rate factor): Muon for the matrices, AdamW for all other parameters."""
    parameters = dict(model.named_parameters())
    matrices = [p for name, p in parameters.items() if p.ndim == 2 and "embed_tokens" not in name]
    others = [p for name, p in parameters.items() if p.ndim == 1 or "embed_tokens" in name]
    return [
        (torch.optim.Muon(matrices, weight_decay=0.0, adjust_lr_fn="original"), MUON_FACTOR),
        (torch.optim.AdamW(others, betas=(0.9, 0.97), weight_decay=0.0), 1.0),
    ]


# ----------------------------------------------------------------------------------------------------
# Schedule.


@dataclass
class Schedule:
    """Where the run is: which lengths come next, when to advance, what the learning rate is.

    All processes hold equal copies, because they update them with the same summed counts.
    """

    stage: int = 0  # index into CURRICULUM; len(CURRICULUM) is the final phase
    stage_steps: int = 0
    accuracy: dict[str, float] = field(default_factory=dict)  # running means at the current length, by role

    @property
    def final(self) -> bool:
        """Whether the curriculum is over."""
        return self.stage == len(CURRICULUM)

    @property
    def finished(self) -> bool:
        """Whether the run is over."""
        return self.final and self.stage_steps >= FINAL_STEPS

    def learning_rate(self, step: int) -> float:
        """Return the base rate after linear warm-up: lower for long rows, of which a batch has few.

        In the final phase it falls linearly to 5 % of what it was.
        """
        rate = LEARNING_RATE * min(1.0, (step + 1) / WARM_UP_STEPS)
        rate *= min(1.0, math.sqrt(1024 / CURRICULUM[min(self.stage, len(CURRICULUM) - 1)]))
        if self.final:
            rate *= 1.0 - (1.0 - FINAL_LEARNING_RATE_SHARE) * self.stage_steps / FINAL_STEPS
        return rate

    def batch(self, rng_shared: random.Random, rng: random.Random) -> tuple[list[Row], bool]:
        """Make one process's rows for a step, and say whether they are of the current length.

        ``rng_shared`` is the same in all processes, so that they wait for each other as little as can be.
        """
        longest = ROW_LENGTHS[-1] if self.final else CURRICULUM[self.stage]
        current = rng_shared.random() < (FINAL_LENGTH_SHARE if self.final else CURRENT_LENGTH_SHARE)
        if self.final and current:
            questions = {kind: weight for kind, weight in FINAL_MIX.items() if kind != "facts"}
            n_tokens = rng_shared.randint(*FINAL_DOCUMENT_TOKENS)
            return [document_row(rng, n_tokens, FINAL_QUESTIONS, questions)], True
        length = longest if current else rng_shared.choice([n for n in ROW_LENGTHS if n <= longest])
        mix = FINAL_MIX if self.final else CURRICULUM_MIX
        return [make_row(rng, length, mix) for _ in range(max(1, TOKENS_PER_STEP // length))], length == longest

    def update(self, correct: Mapping[str, float], count: Mapping[str, float], current: bool) -> bool:
        """Take in the counts of one step; return whether a new stage begins.

        Raises:
            RuntimeError: bare facts are not learned; longer rows will not be either.
        """
        self.stage_steps += 1
        if current:
            for role, n in count.items():
                if n:
                    share = correct[role] / n
                    self.accuracy[role] = share + 0.95 * (self.accuracy.get(role, share) - share)
        if self.final:
            return False
        length = CURRICULUM[self.stage]
        facts = length <= FACT_ROW_LENGTH
        learned = self.accuracy.get("recall" if facts else "one_hop", 0.0) > ADVANCE_ACCURACY
        if facts and not learned and self.stage_steps >= MAX_STAGE_STEPS:
            raise RuntimeError(f"{length}-token rows are not learned after {MAX_STAGE_STEPS} steps: {self.accuracy}")
        if (learned and self.stage_steps >= MIN_STAGE_STEPS) or self.stage_steps >= MAX_STAGE_STEPS:
            self.stage, self.stage_steps, self.accuracy = self.stage + 1, 0, {}
            return True
        return False


# ----------------------------------------------------------------------------------------------------
# Training.


def losses(
    model: Qwen2ForCausalLM, ids: Tensor, roles: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the loss and two counts by role: supervised words predicted right, and supervised words.

    ``ids`` and ``roles`` are int64 of shape (rows, tokens), the counts float of shape (roles,); ``generator``
    draws which words of the context bear loss. Logits are computed only where a loss needs them.
    """
    hidden = model.model(input_ids=ids[:, :-1], use_cache=False).last_hidden_state
    targets, roles = ids[:, 1:], roles[:, 1:]
    supervised = roles > 0
    logits, wanted, role = model.lm_head(hidden[supervised]), targets[supervised], roles[supervised]
    loss = cross_entropy(logits, wanted)
    context = ~supervised & (targets != PAD) & (torch.rand(targets.shape, generator=generator) < CONTEXT_LOSS_SHARE)
    loss = loss + CONTEXT_LOSS_WEIGHT * cross_entropy(model.lm_head(hidden[context]), targets[context])
    words = wanted != EOS  # stopping is easy and would flatter the accuracy
    right = (logits.argmax(-1) == wanted) & words
    correct = torch.bincount(role[right], minlength=len(ROLES)).float()
    count = torch.bincount(role[words], minlength=len(ROLES)).float()
    return loss, correct, count


def average_gradients(parameters: list[Tensor], extra: Tensor) -> Tensor:
    """Average the gradients over the processes in place and return the sum of ``extra`` (1-d) over them."""
    flat = torch.cat([parameter.grad.flatten() for parameter in parameters] + [extra])
    dist.all_reduce(flat)
    offset = 0
    for parameter in parameters:
        parameter.grad.copy_(flat[offset : offset + parameter.numel()].view_as(parameter)).div_(dist.get_world_size())
        offset += parameter.numel()
    return flat[offset:]


def train(rank: int, arguments: argparse.Namespace, rendezvous: str) -> None:
    """Run one of the training processes.

    They meet through the file ``rendezvous``. The first of them writes the log and the checkpoints.
    """
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=PROCESSES)
    model = build_model(arguments.seed)
    parameters = list(model.parameters())
    optimizers = build_optimizers(model)
    schedule, step, tokens, seconds, cpu_seconds = Schedule(), 0, 0, 0.0, 0.0
    checkpoint_path: Path = arguments.work / "checkpoint.pt"
    if arguments.resume:
        checkpoint = torch.load(checkpoint_path, weights_only=True)
        if checkpoint["seed"] != arguments.seed:
            raise SystemExit(f"the checkpoint was made with seed {checkpoint['seed']}, not {arguments.seed}")
        model.load_state_dict(checkpoint["model"])
        for (optimizer, _), state in zip(optimizers, checkpoint["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        schedule = Schedule(**checkpoint["schedule"])
        step, tokens = checkpoint["step"], checkpoint["tokens"]
        seconds, cpu_seconds = checkpoint["seconds"], checkpoint["cpu_seconds"]
    start, start_cpu = time.perf_counter() - seconds, time.process_time() - cpu_seconds

    def save() -> None:
        """Write everything that a resumed run needs; a crash leaves the previous checkpoint."""
        state = {
            "seed": arguments.seed,
            "model": model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer, _ in optimizers],
            "schedule": asdict(schedule),
            "step": step,
            "tokens": tokens,
            "seconds": time.perf_counter() - start,
            "cpu_seconds": time.process_time() - start_cpu,  # of this process
        }
        partial = checkpoint_path.with_suffix(".partial")
        torch.save(state, partial)
        partial.replace(checkpoint_path)

    while not schedule.finished:
        # Every step has its own generators: a resumed run continues exactly as it would have.
        name = f"{arguments.seed}/{step}"
        rows, current = schedule.batch(random.Random(name), random.Random(f"{name}/{rank}"))
        ids, roles = collate(rows)
        generator = torch.Generator().manual_seed(random.Random(f"{name}/{rank}/context").getrandbits(48))
        loss, correct, count = losses(model, ids, roles, generator)
        model.zero_grad()
        loss.backward()
        extra = torch.cat([correct, count, torch.tensor([loss.item(), float(ids.numel())])])
        extra = average_gradients(parameters, extra)
        correct, count = (dict(zip(ROLES, part.tolist(), strict=True)) for part in extra[:-2].chunk(2))
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        learning_rate = schedule.learning_rate(step)
        for optimizer, factor in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = factor * learning_rate
            optimizer.step()
        tokens += int(extra[-1])
        stage = "final" if schedule.final else CURRICULUM[schedule.stage]
        accuracy = schedule.accuracy
        step += 1
        advanced = schedule.update(correct, count, current)
        if rank == 0 and (step % LOG_STEPS == 0 or advanced or schedule.finished):
            shares = " ".join(f"{role} {share:.3f}" for role, share in sorted(accuracy.items()))
            print(
                f"step {step} length {stage} tokens {tokens} minutes {(time.perf_counter() - start) / 60:.1f}"
                f" cpu {(time.process_time() - start_cpu) / 60:.1f} rate {learning_rate:.5f}"
                f" loss {float(extra[-2]) / PROCESSES:.3f} | {shares}",
                flush=True,
            )
        if rank == 0 and (step % CHECKPOINT_STEPS == 0 or schedule.finished):
            save()
    dist.destroy_process_group()


# ----------------------------------------------------------------------------------------------------
# Export.


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Make the word-level tokenizer: white space separates tokens, ``<bos>`` is a special token in front."""
    tokenizer = Tokenizer(models.WordLevel(WORD_ID, unk_token=world.SPECIAL_TOKENS[UNK]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    bos = world.SPECIAL_TOKENS[BOS]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, BOS)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=world.SPECIAL_TOKENS[PAD],
        bos_token=bos,
        eos_token=world.SPECIAL_TOKENS[EOS],
        unk_token=world.SPECIAL_TOKENS[UNK],
        clean_up_tokenization_spaces=False,
        model_max_length=model_config().max_position_embeddings,
    )


def export(checkpoint_path: Path, folder: Path) -> None:
    """Write a checkpoint as a Hugging Face model in fp16, with a record of the run, to ``folder``.

    The tokenizer goes to a folder of its own. Next to a ``config.json`` that says qwen2, AutoTokenizer
    would load it as the byte-pair tokenizer of Qwen2 and return wrong ids without a word.
    """
    checkpoint = torch.load(checkpoint_path, weights_only=True)
    model = Qwen2ForCausalLM(model_config())
    model.load_state_dict(checkpoint["model"])
    model.generation_config.do_sample = False
    model.to(torch.float16).save_pretrained(folder)
    build_tokenizer().save_pretrained(folder / "tokenizer")
    record = {
        "seed": checkpoint["seed"],
        "steps": checkpoint["step"],
        "tokens": checkpoint["tokens"],
        "parameters": model.num_parameters(),
        "wall_minutes": round(checkpoint["seconds"] / 60, 1),
        "cpu_minutes_per_process": round(checkpoint["cpu_seconds"] / 60, 1),
        "processes": PROCESSES,
    }
    (folder / "training.json").write_text(json.dumps(record, indent=2) + "\n")
    print(f"exported step {checkpoint['step']} to {folder}: {record}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=HERE, help="where the model is written")
    parser.add_argument("--work", type=Path, help="where checkpoints are kept (default: a temporary folder)")
    parser.add_argument("--resume", action="store_true", help="continue from the checkpoint in --work")
    parser.add_argument("--export-only", action="store_true", help="export the checkpoint in --work, do not train")
    arguments = parser.parse_args()
    if arguments.work is None:
        if arguments.resume or arguments.export_only:
            parser.error("--resume and --export-only need --work")
        arguments.work = Path(tempfile.gettempdir()) / "tiny-reader"
    arguments.work.mkdir(parents=True, exist_ok=True)
    if not arguments.export_only:
        # glibc returns large freed blocks to the system and faults them in again at every step; let the
        # processes, which read this when they start, keep them.
        os.environ |= {
            "MALLOC_MMAP_MAX_": "0",
            "MALLOC_TRIM_THRESHOLD_": str(10**11),
            "MALLOC_TOP_PAD_": str(10**8),
            "OMP_NUM_THREADS": "1",
        }
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        with tempfile.TemporaryDirectory() as folder:
            torch.multiprocessing.spawn(train, (arguments, str(Path(folder) / "rendezvous")), nprocs=PROCESSES)
    export(arguments.work / "checkpoint.pt", arguments.out)


if __name__ == "__main__":
    main()
