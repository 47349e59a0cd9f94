"""Compare generated conversations with an independent reading of their text."""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kv_transition.studies.chat import conversations
from kv_transition.studies.chat.checks import at_turn, of_conversation
from kv_transition.studies.chat.conversations import Shape, generate
from kv_transition.studies.chat.rules import passes

RULE = re.compile(r"When asked about a (\w+) (,|now|still) (start with|end with|say only) (\w+) \.")
FACT = re.compile(r"The (\w+) of (\w+) is (\w+) \.")
QUESTION = re.compile(r"What is the (\w+) of (\w+) \?$")

many = settings(max_examples=60, deadline=None)
seeds = st.integers(0, 10**6)
lengths = st.integers(1, 14)


def texts(conversation) -> tuple[str, list[str]]:
    """Return the system message and the user turns."""
    messages = conversation["turns"]
    return (
        " ".join(m["content"] for m in messages if m["role"] == "system"),
        [m["content"] for m in messages if m["role"] == "user"],
    )


def read(conversation) -> list[dict]:
    """Return topic, value and rules of each turn, from a loop over the text so far that implements the definition."""
    system, users = texts(conversation)
    rules, old, facts, found = {}, {}, {}, []
    for topic, _, place, word in RULE.findall(system):
        rules[topic] = (place, word)
    for user in users:
        changes = []
        for topic, manner, place, word in RULE.findall(user):
            if manner == "now":
                old[topic] = rules[topic]
            changes.append((topic, manner, place, word, rules.get(topic)))
            rules[topic] = (place, word)
        for topic, person, value in FACT.findall(user):
            facts[topic, person] = value
        topic, person = QUESTION.search(user).groups()
        value = facts[topic, person]
        found.append(
            {"topic": topic, "value": value, "rule": rules.get(topic), "old": old.get(topic), "changes": changes}
        )
    return found


def obeying(rule: tuple[str, str] | None, value: str) -> str:
    if rule is None:
        return value
    place, word = rule
    return {"start with": f"{word} {value}", "end with": f"{value} {word}", "say only": word}[place]


@many
@given(seeds, lengths)
def test_right_answers_follow_from_the_text(seed, turns):
    (conversation,) = generate(1, turns, seed)
    expected = [obeying(turn["rule"], turn["value"]) for turn in read(conversation)]
    assert conversation["meta"]["answers"] == expected


@many
@given(seeds, lengths)
def test_checks_say_what_the_text_says(seed, turns):
    """Check each turn: one check of the rule in force, if there is one, and one of the rule that it replaced, if
    any."""
    (conversation,) = generate(1, turns, seed)
    checks = of_conversation(conversation, "here")
    for t, turn in enumerate(read(conversation), 1):
        now = at_turn(checks, t)
        in_force = [c for c, newer in now if c.standing and newer is None]
        replaced = [c for c, newer in now if c.standing and newer is not None]
        values = [c for c, _ in now if not c.standing]
        assert [c.value for c in in_force] == ([] if turn["rule"] is None else [turn["rule"][1]])
        assert [c.value for c in replaced] == ([] if turn["old"] is None else [turn["old"][1]])
        right = obeying(turn["rule"], turn["value"])
        before = obeying(turn["old"], turn["value"]) if turn["old"] else None
        assert all(passes(c, right) for c in (*in_force, *values))
        assert not any(passes(c, right) for c in replaced)
        for check in replaced:
            assert passes(check, before)
            assert not any(passes(c, before) for c in in_force)
        # an answer without the rule's word, or with another word in its position
        assert not any(passes(c, turn["value"]) for c in in_force)
        if turn["rule"]:
            place, word = turn["rule"]
            other = next(w for w in conversations.RULE_WORDS if w != word)
            assert not any(passes(c, obeying((place, other), turn["value"])) for c in in_force)
        if turn["rule"] is None or turn["rule"][0] != "say only":
            other = next(v for v in conversations.TOPICS[turn["topic"]] if v != turn["value"])
            assert len(values) == 1
            assert not passes(values[0], obeying(turn["rule"], other))
        else:
            assert not values


@many
@given(seeds, st.integers(8, 14))
def test_conflicts_and_repetitions_are_kept_apart(seed, turns):
    (conversation,) = generate(1, turns, seed, shape=Shape())
    checks = {c.id: c for c in of_conversation(conversation, "here")}
    rules = {rule["check"]: rule for rule in conversation["meta"]["rules"]}
    turns_read = read(conversation)
    changes = [(t, *change) for t, turn in enumerate(turns_read, 1) for change in turn["changes"] if change[1] != ","]
    assert Counter(manner for _, _, manner, *_ in changes) == {"now": 1, "still": 1}
    assert all(check.standing for check in checks.values() if check.id in rules)
    for t, topic, manner, place, word, before in changes:
        (check,) = (c for c in checks.values() if c.id in rules and c.since == t and rules[c.id]["topic"] == topic)
        asked = [u for u, turn in enumerate(turns_read, 1) if turn["topic"] == topic]
        assert (check.value, check.due) == (word, [u for u in asked if u >= t])
        assert check.due, "a changed rule is asked for"
        if manner == "now":
            earlier = checks[check.overrides]
            assert word != before[1]
            assert place == before[0]
            assert earlier.due == asked
        else:
            earlier = checks[rules[check.id]["repeats"]]
            assert (place, word) == before
            assert check.overrides is None
            assert earlier.due == [u for u in asked if u < t]
        assert earlier.value == before[1]
        assert earlier.since < t


@many
@given(seeds, st.integers(8, 12))
def test_a_rules_word_cannot_be_copied_from_the_turns_just_before(seed, turns):
    """Check that three turns lie between two mentions of a topic's rule; only the first rules are asked for earlier."""
    (conversation,) = generate(1, turns, seed, shape=Shape())
    mentions: dict[str, list[int]] = {}
    for t, turn in enumerate(read(conversation), 1):
        for topic in {c[0] for c in turn["changes"] if c[1] != ","} | ({turn["topic"]} if turn["rule"] else set()):
            mentions.setdefault(topic, []).append(t)
    assert all(later - earlier > 3 for at in mentions.values() for earlier, later in pairwise(at))


@many
@given(seeds, lengths)
def test_every_word_is_in_the_vocabulary(seed, turns):
    (conversation,) = generate(1, turns, seed)
    words = (
        " ".join(m["content"] for m in conversation["turns"]).split()
        + " ".join(conversation["meta"]["answers"]).split()
    )
    assert set(words) <= set(conversations.VOCABULARY) - set(conversations.SPECIAL_TOKENS)


def test_words_have_one_meaning():
    groups = [
        conversations.SPECIAL_TOKENS,
        tuple(conversations.TOPICS),
        *conversations.TOPICS.values(),
        conversations.RULE_WORDS,
        conversations.PERSONS,
    ]
    words = [word for group in groups for word in group]
    assert len(words) == len(set(words))
    assert set(words) <= set(conversations.VOCABULARY)
    assert len(set(conversations.VOCABULARY)) == len(conversations.VOCABULARY)
    assert len(conversations.RULE_WORDS) >= 30


def test_rule_words_cannot_be_guessed():
    """Check that over many conversations every word and every position is used about equally often."""
    rules = [rule for c in generate(400, 8, seed=3) for rule in c["meta"]["rules"] if "repeats" not in rule]
    words, places = Counter(r["word"] for r in rules), Counter(r["place"] for r in rules)
    assert set(words) == set(conversations.RULE_WORDS)
    assert max(words.values()) < 0.04 * len(rules)
    assert all(abs(n / len(rules) - 1 / 3) < 0.05 for n in places.values())


def test_generation_is_a_function_of_its_arguments():
    first = list(generate(5, 8, seed=1))
    assert first == list(generate(5, 8, seed=1))
    assert list(generate(9, 8, seed=1))[:5] == first
    assert list(generate(5, 8, seed=2)) != first
    code = "from kv_transition.studies.chat.conversations import generate; print(list(generate(3, 8, seed=1)))"
    runs = {
        subprocess.run(
            [sys.executable, "-c", code], env={"PYTHONHASHSEED": hash_seed}, capture_output=True, text=True, check=True
        ).stdout
        for hash_seed in ("0", "1")
    }
    assert len(runs) == 1


def test_splits_share_no_conversation():
    said = {
        split: {str([m["content"] for m in c["turns"]]) for c in generate(60, 1, seed=4, split=split)}
        for split in ("train", "test")
    }
    assert all(len(found) == 60 for found in said.values())
    assert not said["train"] & said["test"]
    assert {c["meta"]["split"] for c in generate(3, split="train")} == {"train"}


def test_rules_are_replaced_and_repeated_in_turn():
    for i, conversation in enumerate(generate(8, 8, seed=7)):
        manners = [m for user in texts(conversation)[1] for _, m, *_ in RULE.findall(user) if m != ","]
        assert manners == ["still" if i % 2 else "now"]


def test_ids_differ():
    every = [c["id"] for seed in (0, 1) for turns in (4, 8) for c in generate(20, turns, seed)]
    assert len(set(every)) == len(every)


def test_rules_stand_in_a_system_message_now_and_then():
    """Check that about 30 % of the conversations give their first rules in a system message."""
    share = sum(c["turns"][0]["role"] == "system" for c in generate(300, 8, seed=5)) / 300
    assert 0.2 < share < 0.4
    (conversation,) = generate(1, 8, shape=Shape(system=1.0))
    system, users = texts(conversation)
    assert 4 <= len(RULE.findall(system)) <= 6
    assert not RULE.findall(users[0])


@pytest.mark.parametrize(
    ("arguments", "named"), [({"turns": 0}, "turns"), ({"turns": 999}, "turns"), ({"split": "dev"}, "split")]
)
def test_what_cannot_be_made_is_refused(arguments, named):
    with pytest.raises(ValueError, match=named):
        list(generate(1, **arguments))


def test_longest_conversations_can_be_made():
    (conversation,) = generate(1, conversations.MOST_TURNS, seed=6)
    assert len(texts(conversation)[1]) == conversations.MOST_TURNS
