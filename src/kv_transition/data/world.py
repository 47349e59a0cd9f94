"""All words of the closed world of the synthetic documents, and the vocabulary of the embedded reader.

This module imports only the standard library.
"""

# ruff: noqa: SIM905 - lists of words read better as text

from __future__ import annotations

import random
from itertools import chain

Words = tuple[str, ...]

SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>", "<unk>")  # ids 0, 1, 2, 3

_FUNCTION_WORDS = tuple(
    """Passage Question Answer Recall : . , The the Where does work? live? Which job have? In which city is based?
    year was founded? Describe employer of works for lives in serves as operates dates from based unknown""".split()
)
FILLER_WORDS = {
    "noun": """river mill bridge garden market road forest tower valley field winter summer harvest letter
        lantern boat cellar kitchen window clock horse stone meadow orchard chapel fence storm candle ladder
        barrel""".split(),
    "adjective": """old quiet cold narrow bright broken wooden distant heavy gentle empty crowded pale rough
        golden silent dusty green early late""".split(),
    "verb": """stood rested waited turned opened closed faded gathered drifted settled remained returned
        vanished appeared shifted""".split(),
    "preposition": "near beside behind above below beyond under along".split(),
    "adverb": "often rarely slowly quickly again always never once".split(),
}
# Filler sentences by length, so that a document can be filled to within three tokens of its target.
FILLER_PATTERNS = {
    4: "The noun verb .".split(),
    5: "The adjective noun verb .".split(),
    6: "The adjective noun adverb verb .".split(),
    7: "The noun verb preposition the noun .".split(),
    8: "The adjective noun verb preposition the noun .".split(),
    9: "The noun adverb verb preposition the adjective noun .".split(),
}
ORGANISATION_TYPES = tuple(
    """Academy Agency Archive Atelier Bakery Bank Brewery Bureau Cafe Cannery Cinema Circus Clinic Club College
    Council Dairy Distillery Factory Farm Fleet Forge Foundry Gallery Garage Group Hospital Hotel House Institute
    Journal Laboratory Library Mine Museum Observatory Opera Orchestra Pharmacy Press Quarry Radio Railway Refinery
    Restaurant School Shipyard Society Stables Store Studio Tavern Theater Transport Trust Vineyard Warehouse Winery
    Workshop Zoo""".split()
)
CITY_SUFFIXES = tuple("Bay Beach Creek Falls Grove Heights Hills Junction Park Springs".split())
JOBS = tuple(
    """actor archivist astronomer baker barber blacksmith botanist brewer butcher carpenter cashier chemist clerk
    composer cook courier dancer dentist diver driver editor engineer farmer florist gardener geologist glazier
    harpist historian inspector jeweler jockey judge lawyer librarian locksmith mason mechanic merchant miner
    notary nurse optician painter photographer pilot plumber poet potter sailor sculptor singer surgeon surveyor
    tailor teacher translator tutor weaver welder""".split()
)
YEARS = tuple(str(year) for year in range(1850, 2020))
PASSAGE_NUMBERS = tuple(str(number) for number in range(1, 201))


def _invent_names() -> tuple[tuple[str, ...], ...]:
    """Return the invented first names, surnames, organisation names and city names: all different words."""
    rng = random.Random("the closed world of the tiny reader")
    onsets = "b br c d dr f g gr h k kl l m n p pr r s st t tr v w z th sh".split()
    vowels = "a e i o u ae ei ou".split()
    endings = "n r l s th m nd ro na lia ton den wick mar vis".split()
    words = chain(_FUNCTION_WORDS, *FILLER_WORDS.values(), ORGANISATION_TYPES, CITY_SUFFIXES, JOBS)
    used = {word.lower() for word in words}
    # Fragments of rude words, and of names that table readers interpret as missing values.
    unwanted = "cum cun fag hor kum nan nig nul pus rap ses sex shi tit".split()

    def invent(count: int, min_syllables: int, max_syllables: int) -> tuple[str, ...]:
        names: list[str] = []
        while len(names) < count:
            syllables = rng.randint(min_syllables, max_syllables)
            name = "".join(rng.choice(onsets) + rng.choice(vowels) for _ in range(syllables)) + rng.choice(endings)
            if name not in used and not any(fragment in name for fragment in unwanted):
                used.add(name)
                names.append(name.capitalize())
        return tuple(names)

    return invent(200, 1, 1), invent(400, 1, 2), invent(250, 2, 2), invent(250, 1, 2)


FIRST_NAMES, SURNAMES, ORGANISATION_NAMES, CITY_NAMES = _invent_names()

VOCABULARY: tuple[str, ...] = tuple(
    chain(
        SPECIAL_TOKENS,
        _FUNCTION_WORDS,
        *FILLER_WORDS.values(),
        ORGANISATION_TYPES,
        CITY_SUFFIXES,
        JOBS,
        PASSAGE_NUMBERS,
        YEARS,
        FIRST_NAMES,
        SURNAMES,
        ORGANISATION_NAMES,
        CITY_NAMES,
    )
)
"""All words; the position of a word is its token id."""


def filler_sentence(rng: random.Random, max_words: int | None = None) -> Words:
    """Return a sentence that states nothing about any entity.

    With ``max_words`` (at least 4) it is the longest sentence that fits; otherwise its length is random.
    """
    if max_words is None:
        pattern = FILLER_PATTERNS[rng.choice(tuple(FILLER_PATTERNS))]
    else:
        pattern = FILLER_PATTERNS[min(max_words, max(FILLER_PATTERNS))]
    return tuple(rng.choice(FILLER_WORDS[word]) if word in FILLER_WORDS else word for word in pattern)


def place_name(rng: random.Random, city: str) -> Words:
    """Return a city with a suffix (``Daena Falls``, probability 0.6) or without (``Daena``)."""
    return (city, rng.choice(CITY_SUFFIXES)) if rng.random() < 0.6 else (city,)


def job_title(rng: random.Random) -> Words:
    """Return a random job."""
    return (rng.choice(JOBS),)


def founding_year(rng: random.Random) -> Words:
    """Return a random year."""
    return (rng.choice(YEARS),)


def organisation_type(rng: random.Random) -> str:
    """Return a random second word of an organisation's name."""
    return rng.choice(ORGANISATION_TYPES)
