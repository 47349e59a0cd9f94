"""Train the tiny reader from scratch: one command, one seed, CPU only.

    python resources/tiny-reader/train.py

The reader is trained on documents of the ``train`` split of ``kv_transition.data.synthetic`` and written to this
script's folder. ``resources/training.py`` says how it is trained and why; this script defines its rows and curriculum.
Rows pack one document and many questions. The loss falls on answers, on words of names that the row has already shown,
and lightly on a random share of all other words.
"""

from __future__ import annotations

import math
import random
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from kv_transition.data import synthetic, world

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent))
import training  # noqa: E402, the folder above is no package
from network import BOS, EOS, PAD, UNK  # noqa: E402

WORD_ID = {word: i for i, word in enumerate(world.VOCABULARY)}
MAX_POSITIONS = 8192

TOKENS_PER_STEP = 2048  # per process; a row longer than this is a batch of its own
ROW_LENGTHS = (64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096)
FACT_ROW_LENGTH = 96  # rows up to this length hold bare facts and no document
CURRENT_LENGTH_SHARE = 0.5  # share of steps at the current length; the others use shorter rows
FINAL_DOCUMENT_TOKENS = (3072, 4084)
FINAL_QUESTIONS = 28
FINAL_LENGTH_SHARE = 0.7  # share of steps on documents of the final size; the others use shorter rows

# How often a row holds bare facts, and how often each kind of question is asked on a document. A completion
# is the beginning of a stated fact ("Recall : Rina Hovis lives in").
CURRICULUM_MIX = {"facts": 0.0, "completion": 0.27, "one_hop": 0.43, "chain": 0.20, "unanswerable": 0.10}
FINAL_MIX = {"facts": 0.01, "completion": 0.05, "one_hop": 0.48, "chain": 0.28, "unanswerable": 0.18}

ROLES = ("context", "name", "recall", "completion", "one_hop", "chain", "unanswerable")


class Row(training.Row):
    """A row whose words may be supervised as ``ROLES``."""

    ROLES = ROLES


def repeated_names_row(rng: random.Random, n_tokens: int) -> Row:
    """Return a row of different names, then the same cycle of names from another start."""
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
    """Return a row of facts about different names, then the same facts in another order."""
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
    """Return a row of a ``train`` document of about the given length and questions of random kinds on it."""
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
            row.roles[second] = ROLES.index("name")
        row.add([*answer, world.SPECIAL_TOKENS[EOS]], kind)
    return row


def make_row(rng: random.Random, n_tokens: int, mix: Mapping[str, float]) -> Row:
    """Return a row of about ``n_tokens`` tokens: facts if it is short or the mix says so, else a document."""
    if n_tokens <= FACT_ROW_LENGTH or rng.random() < mix["facts"]:
        return (repeated_names_row if rng.random() < 0.4 else repeated_facts_row)(rng, n_tokens)
    n_questions = max(4, min(32, n_tokens // 40))
    n_document_tokens = max(synthetic.MIN_DOCUMENT_TOKENS, n_tokens - 14 * n_questions)
    return document_row(rng, n_document_tokens, n_questions, {k: v for k, v in mix.items() if k != "facts"})


@dataclass
class Curriculum(training.Curriculum):
    """The schedule over row lengths in tokens."""

    SIZES = (64, 96, 256, 512, 1024, 2048, 4096)
    UNIT = "length"
    ADVANCE_ACCURACY = 0.93
    WARM_UP_STEPS = 100
    MAX_STAGE_STEPS = 500

    def must_be_learned(self) -> bool:
        return self.size <= FACT_ROW_LENGTH

    def measured(self) -> tuple[str, ...]:
        return ("recall",) if self.size <= FACT_ROW_LENGTH else ("one_hop",)

    def rate_factor(self) -> float:
        """Return less than 1 for long rows, of which a batch has few."""
        return min(1.0, math.sqrt(1024 / self.size))

    def batch(self, name: str, rank: int) -> tuple[list[training.Row], bool]:
        # Lengths are the same in all processes, so that they wait for each other as little as can be.
        shared, own = random.Random(name), random.Random(f"{name}/{rank}")
        longest = ROW_LENGTHS[-1] if self.final else self.size
        current = shared.random() < (FINAL_LENGTH_SHARE if self.final else CURRENT_LENGTH_SHARE)
        if self.final and current:
            questions = {kind: weight for kind, weight in FINAL_MIX.items() if kind != "facts"}
            n_tokens = shared.randint(*FINAL_DOCUMENT_TOKENS)
            return [document_row(own, n_tokens, FINAL_QUESTIONS, questions)], True
        length = longest if current else shared.choice([n for n in ROW_LENGTHS if n <= longest])
        mix = FINAL_MIX if self.final else CURRICULUM_MIX
        return [make_row(own, length, mix) for _ in range(max(1, TOKENS_PER_STEP // length))], length == longest


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Return the word-level tokenizer: white space separates tokens, ``<bos>`` is a special token in front."""
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
        model_max_length=MAX_POSITIONS,
    )


RECIPE = training.Recipe(
    folder=HERE,
    vocabulary=world.VOCABULARY,
    max_position_embeddings=MAX_POSITIONS,
    row=Row,
    curriculum=Curriculum,
    tokenizer=build_tokenizer,
    processes=2,
    checkpoint_steps=250,
    context_loss_weight=0.1,
    context_loss_share=0.15,
)


if __name__ == "__main__":
    training.main(RECIPE, __doc__.splitlines()[0])
