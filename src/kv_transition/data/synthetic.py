"""A synthetic multi-document question-answering task in a small closed world.

The task has the form of LongBench's multi-document tasks: a context of many short passages about invented persons and
organisations, mixed with filler sentences, and a question. Its answer is in one passage (``one_hop``), in two
(``chain``) or in none (``unanswerable``). Every word comes from a fixed vocabulary, so that a word-level tokenizer
knows every word and one word is one token: the length of a document is exact before anything is tokenized. All counts
of tokens below include the ``<bos>`` that the tokenizer puts before a context.

``reader_ambiguous`` is the same with documents that contradict themselves about the subject of the question: two
passages give the same person, or organisation, different values.

Documents belong to the split ``test`` or ``train`` by a hash of their text. The embedded reader
(``resources/tiny-reader``) is trained only on ``train`` documents, and ``reader_qa`` yields ``test`` documents by
default, so the two are disjoint for all seeds.

Apart from its words (`kv_transition.data.world`), this module imports only the standard library.
"""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from types import MappingProxyType

from kv_transition.data.world import (
    CITY_NAMES,
    FILLER_PATTERNS,
    FIRST_NAMES,
    ORGANISATION_NAMES,
    ORGANISATION_TYPES,
    PASSAGE_NUMBERS,
    SURNAMES,
    Words,
    filler_sentence,
    founding_year,
    job_title,
    place_name,
)

# ----------------------------------------------------------------------------------------------------
# Facts and documents.


@dataclass(frozen=True)
class Relation:
    """One attribute of a person or an organisation: its statement and its question."""

    subject: str  # "person" or "organisation"
    statement: Words  # two words between the name and the value: the same shape for every relation
    question: str  # with {name}


RELATIONS: Mapping[str, Relation] = MappingProxyType(
    {
        "employer": Relation("person", ("works", "for"), "Where does {name} work?"),
        "home": Relation("person", ("lives", "in"), "Where does {name} live?"),
        "job": Relation("person", ("serves", "as"), "Which job does {name} have?"),
        "city": Relation("organisation", ("operates", "in"), "In which city is {name} based?"),
        "year": Relation("organisation", ("dates", "from"), "In which year was {name} founded?"),
    }
)
KINDS = ("one_hop", "chain", "unanswerable")
DEFAULT_KINDS: Mapping[str, float] = MappingProxyType({"one_hop": 0.5, "chain": 0.25, "unanswerable": 0.25})
UNKNOWN = "unknown"

QUESTION_TEMPLATE = "\nQuestion : {question} Answer :"
"""The text after the context in a prompt. The model answers with words and ``<eos>``."""
QUESTION_TOKENS = 11
"""Maximum number of tokens of ``QUESTION_TEMPLATE`` with any question."""

MIN_DOCUMENT_TOKENS = 112
MAX_DOCUMENT_TOKENS = 4352
_MAX_ORGANISATIONS = 50
_MAX_FILLERS_PER_PASSAGE = 3
_LARGEST_PERSON_PASSAGE = 53  # heading 6, facts of at most 7, 7 and 6 words, three fillers of at most 9


@dataclass(frozen=True)
class Entity:
    """A person or an organisation: its name (two words) and the value of each of its relations."""

    kind: str  # "person" or "organisation"
    name: Words
    values: Mapping[str, Words]

    def facts(self) -> Iterator[tuple[str, Words]]:
        """Yield (relation, sentence) for every statement of a document about this entity."""
        for relation, value in self.values.items():
            yield relation, (*self.name, *RELATIONS[relation].statement, *value, ".")


@dataclass(frozen=True)
class Document:
    """Shuffled passages about persons and the organisations that employ them."""

    passages: tuple[Words, ...]
    persons: tuple[Entity, ...]
    organisations: tuple[Entity, ...]

    @property
    def words(self) -> Words:
        """Return all words in order, without ``<bos>``."""
        return tuple(chain.from_iterable(self.passages))

    @property
    def text(self) -> str:
        """Return the context: words separated by single spaces, one passage per line."""
        return "\n".join(" ".join(passage) for passage in self.passages)

    @property
    def split(self) -> str:
        """Return ``test`` for the tenth of all documents that the SHA-256 of the words selects, else ``train``."""
        digest = hashlib.sha256(" ".join(self.words).encode()).digest()
        return "test" if int.from_bytes(digest[:8], "big") % 10 == 0 else "train"

    @cached_property
    def employers(self) -> Mapping[Words, Entity]:
        """Return the organisations by name."""
        return {organisation.name: organisation for organisation in self.organisations}


@dataclass(frozen=True)
class Question:
    """A question, its answer and the name it asks about."""

    kind: str
    text: str
    answer: str
    name: Words


def make_document(rng: random.Random, n_tokens: int, filler: float | None = None) -> Document:
    """Return a document of ``n_tokens`` tokens or up to three fewer.

    Surnames and both words of organisation names are unique within a document, so that the last word of a name
    identifies the subject of a question; first names repeat. ``filler`` in [0, 1] scales the share of filler sentences;
    by default each document draws none, some or many.

    Raises:
        ValueError: ``n_tokens`` is outside [MIN_DOCUMENT_TOKENS, MAX_DOCUMENT_TOKENS].
    """
    if not MIN_DOCUMENT_TOKENS <= n_tokens <= MAX_DOCUMENT_TOKENS:
        raise ValueError(
            f"a document has {MIN_DOCUMENT_TOKENS} to {MAX_DOCUMENT_TOKENS} tokens, {n_tokens} were requested"
        )
    if filler is None:
        filler = rng.choice((0.0, 0.5, 1.0))
    surnames = iter(rng.sample(SURNAMES, len(SURNAMES)))
    organisation_names = zip(
        rng.sample(ORGANISATION_NAMES, _MAX_ORGANISATIONS),
        rng.sample(ORGANISATION_TYPES, _MAX_ORGANISATIONS),
        strict=True,
    )
    cities = rng.sample(CITY_NAMES, len(CITY_NAMES))
    expected_passages = n_tokens / (24 + 8 * filler)
    n_organisations = max(1, min(_MAX_ORGANISATIONS, int(expected_passages * rng.uniform(0.35, 0.6))))

    room = n_tokens - 1  # <bos>
    passages: list[list[Words]] = []  # the sentences of each passage, without its number

    def passage(entity: Entity) -> list[Words]:
        sentences = [sentence for _, sentence in entity.facts()]
        n_facts = len(sentences)
        while len(sentences) - n_facts < _MAX_FILLERS_PER_PASSAGE and rng.random() < 0.55 * filler:
            sentences.append(filler_sentence(rng))
        rng.shuffle(sentences)
        return [(":", *entity.name, "."), *sentences]

    def size(sentences: list[Words]) -> int:
        return 2 + sum(map(len, sentences))  # "Passage" and its number

    organisations: list[Entity] = []
    while len(organisations) < n_organisations:
        values = {"city": place_name(rng, cities[len(passages)]), "year": founding_year(rng)}
        organisation = Entity("organisation", next(organisation_names), values)
        sentences = passage(organisation)
        if size(sentences) > room - _LARGEST_PERSON_PASSAGE:
            break
        organisations.append(organisation)
        passages.append(sentences)
        room -= size(sentences)

    persons: list[Entity] = []
    while True:
        values = {
            "employer": rng.choice(organisations).name,
            "home": place_name(rng, cities[len(passages) % len(cities)]),
            "job": job_title(rng),
        }
        person = Entity("person", (rng.choice(FIRST_NAMES), next(surnames)), values)
        sentences = passage(person)
        if size(sentences) > room:
            break
        persons.append(person)
        passages.append(sentences)
        room -= size(sentences)

    while room >= min(FILLER_PATTERNS):
        sentence = filler_sentence(rng, room)
        sentences = rng.choice(passages)
        sentences.insert(rng.randint(1, len(sentences)), sentence)
        room -= len(sentence)

    rng.shuffle(passages)
    numbered = tuple(
        ("Passage", number, *chain.from_iterable(sentences))
        for number, sentences in zip(PASSAGE_NUMBERS[: len(passages)], passages, strict=True)
    )
    return Document(numbered, tuple(persons), tuple(organisations))


def draw_document(rng: random.Random, n_tokens: int, split: str, filler: float | None = None) -> Document:
    """Return the first drawn document that belongs to ``split`` (``train`` or ``test``).

    Raises:
        ValueError: the split or the number of tokens is not allowed.
    """
    if split not in ("train", "test"):
        raise ValueError(f"split is train or test, not {split!r}")
    while True:
        document = make_document(rng, n_tokens, filler)
        if document.split == split:
            return document


def ask(rng: random.Random, document: Document, kind: str, relation: str) -> Question:
    """Return a question of one ``kind`` about a random entity.

    ``relation`` selects the attribute that is asked for; a ``chain`` question ignores it and always asks for the
    employer and its city.

    Raises:
        ValueError: ``kind`` or ``relation`` is not known.
    """
    if kind not in KINDS:
        raise ValueError(f"a question is one of {', '.join(KINDS)}, not {kind!r}")
    if relation not in RELATIONS:
        raise ValueError(f"a relation is one of {', '.join(RELATIONS)}, not {relation!r}")
    if kind == "chain":
        person = rng.choice(document.persons)
        employer = document.employers[person.values["employer"]]
        answer = f"{' '.join(employer.name)} , based in {' '.join(employer.values['city'])}"
        return Question(kind, f"Describe the employer of {' '.join(person.name)} .", answer, person.name)
    about_person = RELATIONS[relation].subject == "person"
    if kind == "one_hop":
        entity = rng.choice(document.persons if about_person else document.organisations)
        name, answer = entity.name, " ".join(entity.values[relation])
    else:
        name, answer = _absent_name(rng, document, about_person), UNKNOWN
    return Question(kind, RELATIONS[relation].question.format(name=" ".join(name)), answer, name)


def _absent_name(rng: random.Random, document: Document, of_person: bool) -> Words:
    """Return a name whose last word, and for an organisation also the first, does not occur in the document."""
    entities = document.persons if of_person else document.organisations
    present = {word for entity in entities for word in entity.name}
    if of_person:
        return rng.choice(FIRST_NAMES), rng.choice([word for word in SURNAMES if word not in present])
    first, second = ([w for w in words if w not in present] for words in (ORGANISATION_NAMES, ORGANISATION_TYPES))
    return rng.choice(first), rng.choice(second)


# ----------------------------------------------------------------------------------------------------
# Examples.


def _balanced(weights: Mapping[str, float]) -> Iterator[str]:
    """Yield keys without end, such that every prefix has them nearly in proportion to their weights."""
    counts: Counter[str] = Counter()
    total = sum(weights.values())
    while True:
        n = counts.total() + 1
        # Rounded, so that the first key wins a tie whatever the last bit of a float is.
        key = max(weights, key=lambda k: round(weights[k] / total * n - counts[k], 9))
        counts[key] += 1
        yield key


def reader_qa(
    lengths: Sequence[int],
    n_per_length: int,
    seed: int,
    kinds: Mapping[str, float] | None = None,
    split: str = "test",
) -> Iterator[dict]:
    """Yield question-answering examples, which depend only on the arguments.

    Example i of a length does not depend on ``n_per_length``, and its context does not depend on ``kinds``: a larger
    ``n_per_length`` extends the list, and different kinds of questions can be asked about the same documents.

    Args:
        lengths: maximum numbers of tokens of a prompt (context with ``<bos>``, and question segment).
        n_per_length: examples of each length.
        seed: any integer.
        kinds: weight of each kind of question (default: one hop 1/2, chain 1/4, unanswerable 1/4). Kinds
            and, within a kind, relations are assigned in turn rather than drawn, so that small samples
            have the right mix.
        split: ``test`` or ``train``.

    Yields:
        ``{"example_id", "question", "context", "answers": [str], "meta": {"kind", "length"}}``.

    Raises:
        ValueError: a length, kind, weight or split is not allowed.
    """
    weights = DEFAULT_KINDS if kinds is None else kinds
    if not set(weights) <= set(KINDS) or min(weights.values(), default=0) < 0 or not sum(weights.values()) > 0:
        raise ValueError(f"kinds maps some of {', '.join(KINDS)} to weights >= 0, not all 0; got {dict(weights)}")
    weights = {kind: weight for kind, weight in weights.items() if weight > 0}
    for length in lengths:
        asked: Counter[str] = Counter()
        for i, kind in zip(range(n_per_length), _balanced(weights), strict=False):
            name = f"reader_qa-{split}-{seed}-{length}-{i:05d}"
            document = draw_document(random.Random(name), length - QUESTION_TOKENS, split)
            relation = tuple(RELATIONS)[asked[kind] % len(RELATIONS)]
            asked[kind] += 1
            question = ask(random.Random(f"{name}-{kind}"), document, kind, relation)
            yield {
                "example_id": name,
                "question": question.text,
                "context": document.text,
                "answers": [question.answer],
                "meta": {"kind": kind, "length": length},
            }


def contradict(rng: random.Random, document: Document, relation: str) -> tuple[Document, Entity, Words] | None:
    """Return the document with a contradiction: another entity's statement of ``relation`` gets the name of a random
    entity.

    Returns the document, whose length is unchanged, the entity and the second value; None if all entities have the same
    value.
    """
    entities = document.persons if RELATIONS[relation].subject == "person" else document.organisations
    rivals = [(a, b) for a in entities for b in entities if a.values[relation] != b.values[relation]]
    if not rivals:
        return None
    entity, other = rng.choice(rivals)
    told = (*other.name, *RELATIONS[relation].statement, *other.values[relation], ".")
    ((number, place),) = (
        (number, place)
        for number, passage in enumerate(document.passages)
        for place in range(len(passage))
        if passage[place : place + len(told)] == told
    )
    passages = list(document.passages)
    passages[number] = passages[number][:place] + entity.name + passages[number][place + len(other.name) :]
    return Document(tuple(passages), document.persons, document.organisations), entity, other.values[relation]


def reader_ambiguous(lengths: Sequence[int], n_per_length: int, seed: int, split: str = "test") -> Iterator[dict]:
    """Yield examples as `reader_qa` does, about documents that contain two answers; either answer is correct.

    The documents are made from those of ``split``; the reader was not trained on such documents.

    Raises:
        ValueError: a length or the split is not allowed.
    """
    for length in lengths:
        for i in range(n_per_length):
            name = f"reader_ambiguous-{split}-{seed}-{length}-{i:05d}"
            rng = random.Random(name)
            relation = tuple(RELATIONS)[i % len(RELATIONS)]
            made = None
            while made is None:
                made = contradict(rng, draw_document(rng, length - QUESTION_TOKENS, split), relation)
            document, entity, other = made
            yield {
                "example_id": name,
                "question": RELATIONS[relation].question.format(name=" ".join(entity.name)),
                "context": document.text,
                "answers": [" ".join(entity.values[relation]), " ".join(other)],
                "meta": {"kind": "ambiguous", "length": length},
            }


def reader_mixed(lengths: Sequence[int], n_per_length: int, seed: int, split: str = "test") -> Iterator[dict]:
    """Yield the examples of `reader_qa`, and after every two of them one of `reader_ambiguous`.

    Raises:
        ValueError: a length or the split is not allowed.
    """
    for length in lengths:
        plain, ambiguous = (make([length], n_per_length, seed, split=split) for make in (reader_qa, reader_ambiguous))
        for i in range(n_per_length):
            yield next(ambiguous if i % 3 == 2 else plain)
