"""Measure which rules the tiny follower still obeys, turn by turn, with its full cache and with compressed ones.

    python resources/tiny-follower/evaluate.py

Conversations of the ``test`` split are played on one growing cache (`kv_transition.studies.chat.run.play`): the model
reads what the user says, answers greedily, and has its own answers in the cache, right or wrong. After each answer a
policy compresses the cache to a share of the tokens so far. An answer counts if it passes the check of the rule in
force; turns in which no rule is due do not count. Writes ``evaluation.json`` next to the weights and renews the table
in the model card.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from statsmodels.stats.proportion import proportion_confint

from kv_transition.budget import Budget
from kv_transition.studies.chat import conversations, turns
from kv_transition.studies.chat.checks import at_turn, of_conversation
from kv_transition.studies.chat.rules import passes

HERE = Path(__file__).resolve().parent

CELLS = {  # turns: policy@budget
    8: ("full@r1", "streaming_llm@r0.2", "random@r0.2", "streaming_llm@r0.5", "random@r0.5"),
    12: ("full@r1",),
}
MAX_NEW_TOKENS = 6  # a right answer has one or two words
TABLE_MARKS = ("<!-- evaluation: begin -->", "<!-- evaluation: end -->")


def load(folder: Path):
    """Return an engine with the weights in fp32."""
    import torch

    from kv_transition.engines.local import LocalEngine

    torch.set_num_threads(1)
    return LocalEngine.from_pretrained(str(folder), dtype="float32", device="cpu")


def said(conversation: Mapping) -> tuple[str | None, list[str]]:
    """What the system says, or None, and what the user says in each turn."""
    by_role = defaultdict(list)
    for message in conversation["turns"]:
        by_role[message["role"]].append(message["content"])
    return next(iter(by_role["system"]), None), by_role["user"]


def play(engine, conversation: Mapping, kind: str = "full", budget: str = "r1", seed: int = 0) -> list[str]:
    """Answer every turn on one cache, compressed by a policy with its default hyper-parameters behind each answer."""
    from kv_transition.policies.catalog import create
    from kv_transition.run import job
    from kv_transition.run.decode import Answer
    from kv_transition.studies.chat import run as chat

    system, users = said(conversation)
    own = turns.render(engine.tokenizer, system, users, chat=True)
    memory = chat.CacheMemory(own, chat.TurnSetting(create(kind, {}), Budget.parse(budget), mode="chat"))
    answers = [
        Answer(job.answer_seed(seed, conversation["id"], number), MAX_NEW_TOKENS) for number in range(1, len(own) + 1)
    ]
    return [engine.tokenizer.decode(one.answer.tokens) for one in chat.play(engine, own, memory, answers)]


def judged(conversation: Mapping, answers: Sequence[str]) -> list[dict]:
    """For each turn, whether the answer passes what is asked of it; None where nothing is.

    ``rule``: that of the rule in force; ``old``: that of a rule which was replaced before; ``value``: the value
    asked for; ``quiet``: turns since the rule's word was last said by the user or due in an answer;
    ``since``: the turn in which the rule was given.
    """
    checks = of_conversation(conversation, conversation["id"])
    (_, users), right = said(conversation), conversation["meta"]["answers"]
    results = []
    for t, answer in enumerate(answers, 1):
        result = {"turn": t, "rule": None, "old": None, "value": None, "quiet": None, "since": None}
        for check, replaced_by in at_turn(checks, t):
            name = "value" if not check.standing else "old" if replaced_by else "rule"
            result[name] = passes(check, answer)
            if name == "rule":
                said_in = [u for u in range(1, t) if check.value in f"{users[u - 1]} {right[u - 1]}".split()]
                result |= {"quiet": t - max(said_in, default=1), "since": check.since}
        results.append(result)
    return results


def rate(outcomes: Sequence[bool | None]) -> dict | None:
    """The share of passed checks with its Wilson interval at 95 %; None where there were none."""
    outcomes = [outcome for outcome in outcomes if outcome is not None]
    if not outcomes:
        return None
    low, high = proportion_confint(sum(outcomes), len(outcomes), method="wilson")
    share = sum(outcomes) / len(outcomes)
    return {"n": len(outcomes), "passed": sum(outcomes), "share": share, "low": float(low), "high": float(high)}


def show(measured: dict | None) -> str:
    return "-" if measured is None else f"{measured['share']:.3f} [{measured['low']:.3f}, {measured['high']:.3f}]"


def markdown_table(cells: Sequence[Mapping]) -> str:
    """Lay the measured shares out, one line a turn and one column a policy."""
    lines = []
    for n_turns in sorted({cell["turns"] for cell in cells}):
        mine = [cell for cell in cells if cell["turns"] == n_turns]
        lines += [f"Conversations of {n_turns} turns, n = {mine[0]['conversations']}:", ""]
        names = ["full cache" if cell["policy"] == "full" else f"{cell['policy']} {cell['budget']}" for cell in mine]
        lines += ["| rule obeyed | " + " | ".join(names) + " |", "|---|" + "---|" * len(mine)]
        rows = {f"turn {t}": [cell["rule"][t - 1] for cell in mine] for t in range(1, n_turns + 1)}
        rows[f"turn {n_turns}, rules of the start"] = [cell["start"][-1] for cell in mine]
        rows["value right, all turns"] = [cell["value"] for cell in mine]
        rows["replaced: the new rule obeyed"] = [cell["new"] for cell in mine]
        rows["replaced: the old rule obeyed"] = [cell["old"] for cell in mine]
        lines += [f"| {name} | " + " | ".join(map(show, row)) + " |" for name, row in rows.items()]
        lines.append("")
    return "\n".join(lines).rstrip()


def print_errors(played: Sequence[Mapping], answers: Sequence[Sequence[str]]) -> None:
    """Print which answers are not the right ones."""
    for conversation, own in zip(played, answers, strict=True):
        users, right = said(conversation)[1], conversation["meta"]["answers"]
        for t, (user, answer, expected) in enumerate(zip(users, own, right, strict=True), 1):
            if answer != expected:
                print(f"{conversation['id']} turn {t}: {user} -> {answer!r}, not {expected!r}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, default=HERE)
    parser.add_argument("--turns", type=int, nargs="+", default=tuple(CELLS))
    parser.add_argument("--conversations", type=int, default=120, help="of each number of turns")
    parser.add_argument("--cells", nargs="+", help="policy@budget, such as random@r0.2")
    parser.add_argument("--seed", type=int, default=2026)
    parser.add_argument("--errors", action="store_true", help="print what the full cache got wrong")
    parser.add_argument("--dry", action="store_true", help="print only, write nothing")
    arguments = parser.parse_args()

    os.environ["OMP_NUM_THREADS"] = "1"
    start = time.process_time()
    engine = load(arguments.model)
    cells = []
    for n_turns in arguments.turns:
        played = list(conversations.generate(arguments.conversations, n_turns, arguments.seed))
        for name in arguments.cells or CELLS.get(n_turns, CELLS[8]):
            policy, budget = name.split("@")
            answers = [play(engine, conversation, policy, budget, arguments.seed) for conversation in played]
            if arguments.errors and policy == "full":
                print_errors(played, answers)
            results = [judged(*pair) for pair in zip(played, answers, strict=True)]
            every = [turn for result in results for turn in result]
            cell = {
                "turns": n_turns,
                "policy": policy,
                "budget": budget,
                "conversations": len(played),
                "rule": [rate([result[t]["rule"] for result in results]) for t in range(n_turns)],
                "start": [
                    rate([result[t]["rule"] for result in results if result[t]["since"] == 1]) for t in range(n_turns)
                ],
                "value": rate([turn["value"] for turn in every]),
                "new": rate([turn["rule"] for turn in every if turn["old"] is not None]),
                "old": rate([turn["old"] for turn in every]),
                "quiet": [rate([turn["rule"] for turn in every if turn["quiet"] == q]) for q in range(n_turns)],
            }
            cells.append(cell)
            last = cell["rule"][min(n_turns, 8) - 1]
            print(f"{n_turns} turns, {name}: at turn {min(n_turns, 8)} {show(last)}, n = {last['n']}", flush=True)
    table = markdown_table(cells)
    print(table)
    if arguments.dry:
        return
    report = {
        "seed": arguments.seed,
        "interval": "Wilson, 95 %",
        "cpu_minutes": round((time.process_time() - start) / 60, 1),
        "results": cells,
    }
    (arguments.model / "evaluation.json").write_text(json.dumps(report, indent=2) + "\n")
    card = arguments.model / "README.md"
    if card.exists():
        begin, end = TABLE_MARKS
        text = card.read_text()
        before, after = text[: text.index(begin) + len(begin)], text[text.index(end) :]
        card.write_text(f"{before}\n{table}\n{after}")


if __name__ == "__main__":
    main()
