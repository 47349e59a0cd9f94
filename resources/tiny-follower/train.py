"""Train the tiny follower from scratch: one command, one seed, one CPU core.

    python resources/tiny-follower/train.py

The follower is a four-layer Qwen2 model with a word-level vocabulary. It is trained on conversations of the ``train``
split of ``kv_transition.studies.chat.conversations`` and written to this script's folder. It is made as the tiny
reader is (``resources/tiny-reader/train.py``, which says why each part is needed) and shares its previous-token heads
and optimisers:

* Layer 0 starts with heads that look one to four words back.
* Training starts with rows of bare rules and facts stated twice in different order, where what is said the second time
  can be recalled.
* A curriculum then makes conversations longer, from one turn to twelve, each time the answers are right often enough.
* A final phase on long conversations lowers the learning rate to 5 %.

The loss falls on the assistant's words and, in the rows of bare statements, on what can be recalled. Rows, curriculum
and learning rate depend on the seed and the step number only, never on the clock.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import random
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from kv_transition.studies.chat import conversations
from kv_transition.studies.chat.conversations import Conversation, Fact, Rule, Shape

HERE = Path(__file__).resolve().parent


def _tiny_reader():
    """The training script of the tiny reader as a module."""
    spec = importlib.util.spec_from_file_location("tiny_reader_train", HERE.parent / "tiny-reader" / "train.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up by name
    spec.loader.exec_module(module)
    return module


reader = _tiny_reader()

WORD_ID = {word: i for i, word in enumerate(conversations.VOCABULARY)}
PAD, BOS, EOS, UNK = range(4)

# ----------------------------------------------------------------------------------------------------
# Configuration.

TOKENS_PER_STEP = 3072
CURRICULUM = (0, 1, 2, 4, 8, 12)  # turns; 0: bare statements
STATEMENT_ROW_TOKENS = (64, 128)
CURRENT_SHARE = 0.6  # share of steps at the current number of turns; the others revisit fewer
STATEMENTS_SHARE = 0.1  # share of steps on bare statements once there are turns
ADVANCE_ACCURACY = 0.95
MIN_STAGE_STEPS = 60
MAX_STAGE_STEPS = 1500  # then go on to more turns all the same
FINAL_STEPS = 800

LEARNING_RATE = 2e-3  # AdamW: embeddings, norms and biases
MUON_FACTOR = 5.0  # Muon: matrices
FINAL_LEARNING_RATE_SHARE = 0.05
WARM_UP_STEPS = 50

EMBEDDING_STD = 0.08
CHECKPOINT_STEPS = 100
LOG_STEPS = 25

# Every message ends with <eos>; a rendering never changes when more turns follow.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ ' <' + message['role'] + '> ' + message['content'] + ' ' + eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}{{ ' <assistant> ' }}{% endif %}"
)


def model_config() -> Qwen2Config:
    """Return the architecture: 0.6 million parameters."""
    return Qwen2Config(
        vocab_size=len(conversations.VOCABULARY),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=4096,
        rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
        rms_norm_eps=1e-6,
        tie_word_embeddings=True,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )


# ----------------------------------------------------------------------------------------------------
# Rows.

# What a word is supervised as; context is not.
ROLES = ("context", "name", "statement", "rule", "value", "end")
ROLE_ID = {role: i for i, role in enumerate(ROLES)}


@dataclass
class Row:
    """A training sequence: words and, for each, the role (a key of ``ROLE_ID``) it is supervised in."""

    words: list[str] = field(default_factory=lambda: ["<bos>"])
    roles: list[int] = field(default_factory=lambda: [0])

    def add(self, words: Iterable[str], role: str = "context") -> None:
        """Append words that share a role."""
        for word in words:
            self.words.append(word)
            self.roles.append(ROLE_ID[role])


def repeated_words_row(rng: random.Random, n_tokens: int) -> Row:
    """Make a row of different words, then the same cycle of words from another start."""
    values = [value for values in conversations.TOPICS.values() for value in values]
    pool = rng.choice((conversations.PERSONS, conversations.RULE_WORDS, values))
    words = rng.sample(pool, min(n_tokens // 2 - 2, len(pool)))
    start = rng.randrange(len(words))
    row = Row()
    row.add(words)
    row.add(("<user>", words[start]))
    for i in range(start + 1, start + len(words)):
        # The successor of the last word was never shown.
        row.add([words[i % len(words)]], "name" if i % len(words) else "context")
    return row


def statements_row(rng: random.Random, n_tokens: int) -> Row:
    """Make a row of rules and facts, then the same ones in another order."""
    n = max(2, n_tokens // 18)
    share = rng.choice((0.0, 0.5, 1.0))
    n_rules = min(len(conversations.TOPICS), sum(rng.random() < share for _ in range(n)))
    topics = rng.sample(tuple(conversations.TOPICS), n_rules)
    words = rng.sample(conversations.RULE_WORDS, n_rules)
    places = rng.choices(tuple(conversations.PLACES), k=n_rules)
    statements: list[Rule | Fact] = [Rule(*parts) for parts in zip(topics, places, words, strict=True)]
    for person in rng.sample(conversations.PERSONS, n - n_rules):
        topic = rng.choice(tuple(conversations.TOPICS))
        statements.append(Fact(person, topic, rng.choice(conversations.TOPICS[topic])))
    row = Row()
    for statement in rng.sample(statements, len(statements)):
        row.add(statement.sentence)
    row.add(("<user>",))
    for statement in rng.sample(statements, len(statements)):
        recalled = {6, 8} if isinstance(statement, Rule) else {5}
        for i, word in enumerate(statement.sentence):
            row.add([word], "statement" if i in recalled else "context")
    return row


def conversation_row(conversation: Conversation) -> Row:
    """Lay a conversation out as the chat template does, with the right answers."""
    row = Row()
    if conversation.system:
        row.add(("<system>", *(word for rule in conversation.system for word in rule.sentence), "<eos>"))
    for turn in conversation.turns:
        row.add(("<user>", *turn.user, "<eos>", "<assistant>"))
        for word in turn.answer:
            row.add([word], "value" if word == turn.asked.value else "rule")
        row.add(["<eos>"], "end")
    return row


def drawn_row(rng: random.Random, turns: int) -> Row:
    """Make a row of a ``train`` conversation of a number of turns; 0: bare statements."""
    if turns == 0:
        n_tokens = rng.choice(STATEMENT_ROW_TOKENS)
        return repeated_words_row(rng, n_tokens) if rng.random() < 0.25 else statements_row(rng, n_tokens)
    shape = Shape(
        turns=turns,
        rules=(2, 7),
        gap=rng.choice((0, 1, 3)),
        replaced=0.7,
        repeated=0.5,
        free=0.2,
    )
    return conversation_row(conversations.draw_from(rng, shape, "train"))


def collate(rows: Sequence[Row]) -> tuple[Tensor, Tensor]:
    """Pad rows and return (ids, roles), both int64 of shape (rows, tokens)."""
    longest = max(len(row.words) for row in rows)
    ids, roles = torch.full((len(rows), longest), PAD), torch.zeros(len(rows), longest, dtype=torch.int64)
    for i, row in enumerate(rows):
        ids[i, : len(row.words)] = torch.tensor([WORD_ID[word] for word in row.words])
        roles[i, : len(row.roles)] = torch.tensor(row.roles)
    return ids, roles


# ----------------------------------------------------------------------------------------------------
# Model and schedule.


def build_model(seed: int) -> Qwen2ForCausalLM:
    """Make the model with its initial weights, which depend on the seed only: drawn as the tiny reader's."""
    return reader.build_model(seed, model_config())


@dataclass
class Schedule:
    """Where the run is: which conversations come next, when to advance, what the learning rate is."""

    stage: int = 0  # index into CURRICULUM; len(CURRICULUM) is the final phase
    stage_steps: int = 0
    accuracy: dict[str, float] = field(default_factory=dict)  # running means at the current number of turns, by role

    @property
    def final(self) -> bool:
        """Whether the curriculum is over."""
        return self.stage == len(CURRICULUM)

    @property
    def finished(self) -> bool:
        """Whether the run is over."""
        return self.final and self.stage_steps >= FINAL_STEPS

    def learning_rate(self, step: int) -> float:
        """Return the base rate after linear warm-up; in the final phase it falls linearly to 5 %."""
        rate = LEARNING_RATE * min(1.0, (step + 1) / WARM_UP_STEPS)
        if self.final:
            rate *= 1.0 - (1.0 - FINAL_LEARNING_RATE_SHARE) * self.stage_steps / FINAL_STEPS
        return rate

    def batch(self, rng: random.Random) -> tuple[list[Row], bool]:
        """Make the rows of a step, and say whether they are of the current number of turns."""
        most = CURRICULUM[min(self.stage, len(CURRICULUM) - 1)]
        if most and rng.random() < STATEMENTS_SHARE:
            turns = 0
        elif rng.random() < CURRENT_SHARE:
            turns = most
        else:
            turns = rng.randint(1, most) if most else 0
        rows, n_tokens = [], 0
        while n_tokens < TOKENS_PER_STEP:
            rows.append(drawn_row(rng, turns))
            n_tokens += len(rows[-1].words)
        return rows, turns == most

    def update(self, correct: dict[str, float], count: dict[str, float], current: bool) -> bool:
        """Take in the counts of one step; return whether a new stage begins.

        Raises:
            RuntimeError: bare statements are not learned; conversations will not be either.
        """
        self.stage_steps += 1
        if current:
            for role, n in count.items():
                if n:
                    share = correct[role] / n
                    self.accuracy[role] = share + 0.95 * (self.accuracy.get(role, share) - share)
        if self.final:
            return False
        measured = ("rule", "value") if CURRICULUM[self.stage] else ("statement",)
        learned = min(self.accuracy.get(role, 0.0) for role in measured) > ADVANCE_ACCURACY
        if self.stage == 0 and not learned and self.stage_steps >= MAX_STAGE_STEPS:
            raise RuntimeError(f"bare statements are not learned after {MAX_STAGE_STEPS} steps: {self.accuracy}")
        if (learned and self.stage_steps >= MIN_STAGE_STEPS) or self.stage_steps >= MAX_STAGE_STEPS:
            self.stage, self.stage_steps, self.accuracy = self.stage + 1, 0, {}
            return True
        return False


# ----------------------------------------------------------------------------------------------------
# Training.


def losses(model: Qwen2ForCausalLM, ids: Tensor, roles: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the loss and two counts by role [roles]: supervised words predicted right, and supervised words.

    ``ids`` and ``roles`` are int64 of shape (rows, tokens). Logits are computed only where a loss needs them.
    """
    hidden = model.model(input_ids=ids[:, :-1], use_cache=False).last_hidden_state
    targets, roles = ids[:, 1:], roles[:, 1:]
    supervised = roles > 0
    logits, wanted, role = model.lm_head(hidden[supervised]), targets[supervised], roles[supervised]
    right = logits.argmax(-1) == wanted
    correct = torch.bincount(role[right], minlength=len(ROLES)).float()
    return cross_entropy(logits, wanted), correct, torch.bincount(role, minlength=len(ROLES)).float()


def train(arguments: argparse.Namespace) -> None:
    """Train and leave a checkpoint in the folder ``--work``."""
    torch.set_num_threads(1)
    model = build_model(arguments.seed)
    parameters = list(model.parameters())
    optimizers = reader.build_optimizers(model)
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
            "cpu_seconds": time.process_time() - start_cpu,
        }
        partial = checkpoint_path.with_suffix(".partial")
        torch.save(state, partial)
        partial.replace(checkpoint_path)

    while not schedule.finished:
        # Every step has its own generator: a resumed run continues exactly as it would have.
        rows, current = schedule.batch(random.Random(f"follower/{arguments.seed}/{step}"))
        ids, roles = collate(rows)
        loss, *counts = losses(model, ids, roles)
        model.zero_grad()
        loss.backward()
        correct, count = (dict(zip(ROLES, part.tolist(), strict=True)) for part in counts)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        learning_rate = schedule.learning_rate(step)
        for optimizer, factor in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = factor * learning_rate
            optimizer.step()
        tokens += ids.numel()
        stage = "final" if schedule.final else CURRICULUM[schedule.stage]
        accuracy = schedule.accuracy
        step += 1
        advanced = schedule.update(correct, count, current)
        if step % LOG_STEPS == 0 or advanced or schedule.finished:
            shares = " ".join(f"{role} {share:.3f}" for role, share in sorted(accuracy.items()))
            print(
                f"step {step} turns {stage} tokens {tokens} minutes {(time.perf_counter() - start) / 60:.1f}"
                f" cpu {(time.process_time() - start_cpu) / 60:.1f} rate {learning_rate:.5f}"
                f" loss {loss.item():.3f} | {shares}",
                flush=True,
            )
        if step % CHECKPOINT_STEPS == 0 or schedule.finished:
            save()


# ----------------------------------------------------------------------------------------------------
# Export.


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Make the word-level tokenizer: white space separates tokens; ``<bos>`` comes from the chat template."""
    tokenizer = Tokenizer(models.WordLevel(WORD_ID, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        additional_special_tokens=["<system>", "<user>", "<assistant>"],
        clean_up_tokenization_spaces=False,
        model_max_length=model_config().max_position_embeddings,
        chat_template=CHAT_TEMPLATE,
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
        "cpu_minutes": round(checkpoint["cpu_seconds"] / 60, 1),
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
        arguments.work = Path(tempfile.gettempdir()) / "tiny-follower"
    arguments.work.mkdir(parents=True, exist_ok=True)
    if not arguments.export_only:
        train(arguments)
    export(arguments.work / "checkpoint.pt", arguments.out)


if __name__ == "__main__":
    main()
