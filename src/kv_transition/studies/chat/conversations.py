"""Generated conversations whose first turn gives rules that a later turn changes, in a small closed world.

The user states once how to answer when asked about a pet, a town or a job ("When asked about a pet , end with lantern
."). In each following turn the user tells facts about persons and asks for one of them. The question determines which
rule applies. The rule's word was often given many turns earlier, so the model must read it from the cache and cannot
copy it from the previous answer. Words and facts are drawn for each conversation and cannot be guessed. A later turn
replaces a rule ("When asked about a pet now end with harbor .") or repeats it ("still end with ...").

Every word is in `VOCABULARY`; white space separates words. ``resources/tiny-follower`` is a model trained on
conversations of the split ``train``; `generate` yields conversations of ``test``. A hash of the text determines the
split, for all seeds. This module imports only the standard library and `synthetic`.
"""

# ruff: noqa: SIM905 - lists of words read better as text

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import chain
from types import MappingProxyType
from typing import Any

from kv_transition.data import world

Words = tuple[str, ...]

# ----------------------------------------------------------------------------------------------------
# The world: all words.

SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>", "<unk>", "<system>", "<user>", "<assistant>")

TOPICS: Mapping[str, Words] = MappingProxyType(
    {
        topic: tuple(values.split())
        for topic, values in {
            "pet": "heron otter hamster gecko rabbit pony parrot turtle ferret goat lizard canary",
            "town": " ".join(world.CITY_NAMES[:12]),
            "job": "baker pilot nurse welder tailor miner sailor judge potter farmer diver weaver",
            "colour": "red blue green yellow white black brown grey pink purple turquoise scarlet",
            "drink": "tea coffee cocoa milk juice cider lemonade water soda broth punch syrup",
            "tool": "hammer saw drill chisel spade rake wrench pliers axe file trowel anvil",
            "sport": "tennis hockey rowing judo golf rugby cricket archery fencing curling sailing boxing",
            "fruit": "apple pear plum cherry mango banana fig grape melon papaya quince apricot",
            "flower": "rose tulip daisy lily orchid violet iris poppy jasmine lupin peony aster",
            "metal": "iron copper silver gold tin zinc nickel cobalt bronze brass steel platinum",
            "game": "chess poker domino bingo checkers bridge rummy darts marbles lotto snooker skittles",
            "dance": "waltz tango polka samba ballet rumba salsa foxtrot jive minuet mambo flamenco",
        }.items()
    }
)
"""Attributes of a person that can be asked for, and their values."""

PERSONS = world.FIRST_NAMES[:120]

RULE_WORDS: Words = tuple(
    """anchor arrow basket beacon blanket bottle bucket button candle canvas carpet castle chapel clock cloud comet
    compass cradle crystal curtain desert drum engine feather forest fountain garden glacier harbor helmet island kettle
    ladder lantern letter magnet meadow mirror mountain needle ocean paper pebble pillow pocket puzzle quilt ribbon
    river rocket saddle shadow signal statue stone tower tunnel valley wagon whistle window wheel carriage
    chimney""".split()
)
"""Words with which answers must start or end, or of which they must consist."""

PLACES: Mapping[str, Words] = MappingProxyType(
    {"start": ("start", "with"), "end": ("end", "with"), "only": ("say", "only")}
)
"""Positions of a rule's word in an answer, and the two words of the rule that express each."""
CHECK_KINDS: Mapping[str, str] = MappingProxyType({"start": "starts_with", "end": "ends_with", "only": "answer"})

FIRST, REPLACED, REPEATED = ",", "now", "still"  # the word after the topic of a rule

_FUNCTION_WORDS = "The of is . What the ? When asked about a , now still start with end say only".split()

VOCABULARY: Words = tuple(
    dict.fromkeys(chain(SPECIAL_TOKENS, _FUNCTION_WORDS, TOPICS, *TOPICS.values(), RULE_WORDS, PERSONS))
)
"""All words; the position of a word is its token id."""

# ----------------------------------------------------------------------------------------------------
# One conversation.

MOST_TURNS = len(PERSONS) // 3  # at most three facts a turn, each about another person


@dataclass(frozen=True)
class Rule:
    """A rule: how to answer when asked about a topic."""

    topic: str
    place: str  # a key of PLACES
    word: str
    manner: str = FIRST

    @property
    def sentence(self) -> Words:
        return ("When", "asked", "about", "a", self.topic, self.manner, *PLACES[self.place], self.word, ".")

    def answer(self, value: str) -> Words:
        """Return the answer that follows the rule."""
        return {"start": (self.word, value), "end": (value, self.word), "only": (self.word,)}[self.place]


@dataclass(frozen=True)
class Fact:
    """A fact about a person."""

    person: str
    topic: str
    value: str

    @property
    def sentence(self) -> Words:
        return ("The", self.topic, "of", self.person, "is", self.value, ".")

    @property
    def question(self) -> Words:
        return ("What", "is", "the", self.topic, "of", self.person, "?")


@dataclass(frozen=True)
class Turn:
    """One turn: the user's words in their order, and the rule that applies to the question."""

    rules: tuple[Rule, ...]
    facts: tuple[Fact, ...]
    asked: Fact
    due: Rule | None

    @property
    def user(self) -> Words:
        said = chain.from_iterable(part.sentence for part in (*self.rules, *self.facts))
        return (*said, *self.asked.question)

    @property
    def answer(self) -> Words:
        """Return the correct answer."""
        return (self.asked.value,) if self.due is None else self.due.answer(self.asked.value)


@dataclass(frozen=True)
class Conversation:
    """A conversation: rules, given by the system or in the first turn, and the turns."""

    system: tuple[Rule, ...]
    turns: tuple[Turn, ...]

    @property
    def split(self) -> str:
        """Return ``test`` for the tenth of all conversations that the SHA-256 of the words selects, else ``train``."""
        words = chain((word for rule in self.system for word in rule.sentence), *(turn.user for turn in self.turns))
        digest = hashlib.sha256(" ".join(words).encode()).digest()
        return "test" if int.from_bytes(digest[:8], "big") % 10 == 0 else "train"


@dataclass(frozen=True)
class Shape:
    """The parameters of drawing conversations."""

    turns: int = 8
    rules: tuple[int, int] = (4, 6)  # minimum and maximum number at the start
    facts: tuple[int, int] = (1, 3)  # minimum and maximum number per turn
    gap: int = 3  # minimum number of turns between two mentions of a rule's topic, except those at the start
    system: float = 0.3  # probability that the rules are in a system message
    replaced: float = 1.0  # probability that a rule is replaced
    repeated: float = 1.0  # probability that a rule is repeated
    free: float = 0.12  # probability of a question about a topic without a rule
    earlier: float = 0.25  # probability that the fact asked for was told in an earlier turn


def draw(rng: random.Random, shape: Shape) -> Conversation:
    """Return a randomly drawn conversation."""
    n = shape.turns
    topics = rng.sample(tuple(TOPICS), rng.randint(*shape.rules))
    words = iter(rng.sample(RULE_WORDS, len(topics) + 1))
    given = tuple(Rule(topic, rng.choice(tuple(PLACES)), next(words)) for topic in topics)
    in_force = {rule.topic: rule for rule in given}
    first_in_system = rng.random() < shape.system

    changes: dict[int, Rule] = {}
    changed = zip(((REPLACED, shape.replaced), (REPEATED, shape.repeated)), rng.sample(given, 2), strict=True)
    for (manner, share), old in changed:
        free = [t for t in range(2, max(2, n - shape.gap - 1) + 1) if t <= n and t not in changes]
        if free and rng.random() < share:
            word = next(words) if manner == REPLACED else old.word
            changes[rng.choice(free)] = Rule(old.topic, old.place, word, manner)
    wanted: dict[
        int, str
    ] = {}  # a changed rule must be asked for; the rule with the fewest remaining turns chooses first
    for changed_at, rule in sorted(changes.items(), reverse=True):
        if late := [t for t in range(changed_at + shape.gap + 1, n + 1) if t not in wanted]:
            wanted[rng.choice(late)] = rule.topic

    planned = [*wanted.items(), *((t, rule.topic) for t, rule in changes.items())]
    persons = iter(rng.sample(PERSONS, len(PERSONS)))
    told: list[Fact] = []
    mentioned: dict[str, int] = {}
    turns = []
    for t in range(1, n + 1):
        change = changes.get(t)
        if change:
            in_force[change.topic] = change
            mentioned[change.topic] = t
        topic = wanted.get(t)
        if topic is None:
            soon = {topic for when, topic in planned if t < when <= t + shape.gap}
            allowed = [topic for topic in topics if t - mentioned.get(topic, -n) > shape.gap and topic not in soon]
            if not allowed or rng.random() < shape.free:
                allowed = [topic for topic in TOPICS if topic not in in_force]
            topic = rng.choice(allowed)
        if topic in in_force:
            mentioned[topic] = t
        facts = []
        for _ in range(rng.randint(*shape.facts)):
            about = rng.choice(tuple(TOPICS))
            facts.append(Fact(next(persons), about, rng.choice(TOPICS[about])))
        before = [fact for fact in told if fact.topic == topic]
        if before and rng.random() < shape.earlier:
            asked = rng.choice(before)
        else:
            place = rng.randrange(len(facts))
            asked = facts[place] = Fact(facts[place].person, topic, rng.choice(TOPICS[topic]))
        told += facts
        rules = (change,) if change else ()
        if t == 1 and not first_in_system:
            rules = given
        turns.append(Turn(rules, tuple(facts), asked, in_force.get(topic)))
    return Conversation(given if first_in_system else (), tuple(turns))


def draw_from(rng: random.Random, shape: Shape, split: str) -> Conversation:
    """Return the first drawn conversation that belongs to ``split`` (``train`` or ``test``).

    Raises ValueError if there is no such split.
    """
    if split not in ("train", "test"):
        raise ValueError(f"split is train or test, not {split!r}")
    while True:
        conversation = draw(rng, shape)
        if conversation.split == split:
            return conversation


# ----------------------------------------------------------------------------------------------------
# The form in which conversations are played.


def generate(
    n: int, turns: int = 8, seed: int = 0, *, split: str = "test", shape: Shape | None = None
) -> Iterator[dict[str, Any]]:
    """Yield conversations, which depend only on the arguments; a larger ``n`` extends the list.

    The check of a rule is in force from the turn in which the rule was given to the end, so that a replaced rule is
    measured further; it is ``due`` in the turns that ask about its topic. The check of a replacing rule ``overrides``
    it. If a rule is repeated, its first check is due before the repetition, and the check of the repetition from then
    on. In addition, each turn has a check of the value asked for: ``contains``, or ``answer`` if no rule is in force;
    none if the rule omits the value.

    Args:
        n: number of conversations.
        turns: user turns in each.
        seed: any integer.
        split: ``test`` or ``train``.
        shape: parameters of drawing; its ``turns`` is replaced by ``turns``. By default a rule is replaced in the 1st,
            3rd, ... conversation and repeated in the others.

    Yields:
        ``{"id", "turns": [{"role": "system" | "user", "content", "checks"?}], "checks", "meta"}`` with the checks
        ``{"id", "kind", "value", "since", "until", "due"?, "overrides"?}`` and meta ``{"split", "answers", "rules"}``:
        the correct answer of each user turn, and for each rule's check its topic, place, word and the check that it
        ``repeats``.

    Raises:
        ValueError: there is less than one turn or more than `MOST_TURNS`, or no such split.
    """
    if not 1 <= turns <= MOST_TURNS:
        raise ValueError(f"a conversation has 1 to {MOST_TURNS} turns, {turns} were requested")
    for i in range(n):
        name = f"rules-{split}-{seed}-{turns}-{i:05d}"
        own = shape or Shape(replaced=1 - i % 2, repeated=i % 2)
        conversation = draw_from(random.Random(name), replace(own, turns=turns), split)
        yield _as_played(name, conversation, split)


def _as_played(name: str, conversation: Conversation, split: str) -> dict[str, Any]:
    texts = [" ".join(turn.user) for turn in conversation.turns]
    played: list[dict[str, Any]] = [{"role": "user", "content": text, "checks": []} for text in texts]
    asked: dict[str, list[int]] = {}
    for t, turn in enumerate(conversation.turns, 1):
        asked.setdefault(turn.asked.topic, []).append(t)

    checks: list[dict[str, Any]] = []
    rules = []
    latest: dict[str, dict[str, Any]] = {}
    given = [(1, rule) for rule in conversation.system]
    given += [(t, rule) for t, turn in enumerate(conversation.turns, 1) for rule in turn.rules]
    for number, (since, rule) in enumerate(given, 1):
        check: dict[str, Any] = {
            "id": f"r{number}",
            "kind": CHECK_KINDS[rule.place],
            "value": rule.word,
            "since": since,
            "until": None,
            "due": [t for t in asked.get(rule.topic, []) if t >= since],
        }
        about = {"check": check["id"], "topic": rule.topic, "place": rule.place, "word": rule.word}
        before = latest.get(rule.topic)
        if rule.manner == REPLACED:
            check["overrides"] = before["id"]
        elif rule.manner == REPEATED:
            before["due"] = [t for t in before["due"] if t < since]
            about["repeats"] = before["id"]
        latest[rule.topic] = check
        rules.append(about)
        (checks if rule.manner == FIRST else played[since - 1]["checks"]).append(check)

    for t, turn in enumerate(conversation.turns, 1):
        if turn.due is None or turn.due.place != "only":
            kind = "answer" if turn.due is None else "contains"
            check = {"id": f"v{t}", "kind": kind, "value": turn.asked.value, "since": t, "until": t}
            played[t - 1]["checks"].append(check)

    system = " ".join(word for rule in conversation.system for word in rule.sentence)
    return {
        "id": name,
        "turns": [{"role": "system", "content": system}, *played] if system else played,
        "checks": checks,
        "meta": {"split": split, "answers": [" ".join(turn.answer) for turn in conversation.turns], "rules": rules},
    }
