"""Train the tiny follower from scratch: one command, one seed, one CPU core.

    python resources/tiny-follower/train.py

The follower is trained on conversations of the ``train`` split of ``kv_transition.studies.chat.conversations`` and
written to this script's folder. ``resources/training.py`` says how it is trained and why; this script defines its rows
and curriculum. The loss falls on the assistant's words and, in the rows of bare statements, on what can be recalled.
"""

from __future__ import annotations

import random
import sys
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from kv_transition.studies.chat import conversations
from kv_transition.studies.chat.conversations import Conversation, Fact, Rule, Shape

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent))
import training  # noqa: E402, the folder above is no package

WORD_ID = {word: i for i, word in enumerate(conversations.VOCABULARY)}
MAX_POSITIONS = 4096

TOKENS_PER_STEP = 3072
STATEMENT_ROW_TOKENS = (64, 128)
CURRENT_SHARE = 0.6  # share of steps at the current number of turns; the others use fewer
STATEMENTS_SHARE = 0.1  # share of steps on bare statements once there are turns

# Every message ends with <eos>; a rendering never changes when more turns follow.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ ' <' + message['role'] + '> ' + message['content'] + ' ' + eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}{{ ' <assistant> ' }}{% endif %}"
)


class Row(training.Row):
    """A row whose words may be supervised as ``ROLES``."""

    ROLES = ("context", "name", "statement", "rule", "value", "end")


def repeated_words_row(rng: random.Random, n_tokens: int) -> Row:
    """Return a row of different words, then the same cycle of words from another start."""
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
    """Return a row of rules and facts, then the same ones in another order."""
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
    """Return a conversation with the right answers, in the form of the chat template."""
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
    """Return a row of a ``train`` conversation of a number of turns; 0: bare statements."""
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


@dataclass
class Curriculum(training.Curriculum):
    """The schedule over numbers of turns; 0 means bare statements."""

    SIZES = (0, 1, 2, 4, 8, 12)
    UNIT = "turns"
    ADVANCE_ACCURACY = 0.95
    WARM_UP_STEPS = 50
    MAX_STAGE_STEPS = 1500

    def measured(self) -> tuple[str, ...]:
        return ("rule", "value") if self.size else ("statement",)

    def batch(self, name: str, rank: int) -> tuple[list[training.Row], bool]:
        rng, most = random.Random(f"follower/{name}"), self.size
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


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Return the word-level tokenizer: white space separates tokens; ``<bos>`` comes from the chat template."""
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
        model_max_length=MAX_POSITIONS,
        chat_template=CHAT_TEMPLATE,
    )


RECIPE = training.Recipe(
    folder=HERE,
    vocabulary=conversations.VOCABULARY,
    max_position_embeddings=MAX_POSITIONS,
    row=Row,
    curriculum=Curriculum,
    tokenizer=build_tokenizer,
)


if __name__ == "__main__":
    training.main(RECIPE, __doc__.splitlines()[0])
