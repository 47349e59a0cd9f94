"""Add up the figures of campaigns and write them into docs/reliability.md."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kv_transition.provenance import write_json, write_text

PAGE = Path(__file__).parents[2] / "docs/reliability.md"
BEGIN, END = "<!-- figures of tests/faults: python -m tests.faults --docs -->", "<!-- end of these figures -->"
NAMES = {
    "kill -9": "kill -9 at random moments: everything, Snakemake, the command line, any process",
    "kill -9 served": "kill -9 while a server of this project is asked: the server (started again within "
    "10 s), a client, or the server and everything",
    "disk full": "disk full from the first file on (a small file system that grows bit by bit)",
    "disk full late": "disk full at figures, report, SQLite and exports",
    "two_on_one": "two runs on the same results",
    "two_side_by_side": "two runs from one folder, results of their own",
    "seen_a_second_late": "files are seen a second after they were written",
    "rename_not_atomic": "renaming copies, and one copy in six dies halfway",
    "clock_goes_back": "clock put back by a day",
    "read_only": "results on a disk that became read-only",
    "requests": "mutated requests to a server",
}


def write(sources: Sequence[Path], kept: Path) -> None:
    """Add campaigns to the file that stores them, and replace the figures on the page."""
    known = json.loads(kept.read_text(encoding="utf-8")) if kept.exists() else {}
    campaigns = known.get("campaigns", [])
    for source in sources:
        campaign = json.loads(source.read_text(encoding="utf-8"))
        if campaign not in campaigns:
            campaigns.append(campaign)
    write_json(kept, known | {"campaigns": campaigns})
    found = {name: [each["kinds"][name] for each in campaigns if name in each["kinds"]] for name in NAMES}
    kinds = {name: (largest if name == "requests" else added)(of) for name, of in found.items() if of}
    text = PAGE.read_text(encoding="utf-8")
    own = "\n".join([BEGIN, "", *table(kinds), "", *sentences(kinds), "", END])
    write_text(PAGE, re.sub(re.escape(BEGIN) + ".*?" + re.escape(END), lambda _: own, text, flags=re.DOTALL))


def added(figures: Sequence[Any]) -> Any:
    """Return the sum of numbers or of lists, or, for dictionaries, the sums by name."""
    if not figures:
        return None
    if isinstance(figures[0], dict):
        names = dict.fromkeys(name for each in figures for name in each)
        return {name: added([each[name] for each in figures if name in each]) for name in names}
    return sum(figures[1:], figures[0])


def largest(figures: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the figures with the most tries: times and memory have no sum."""
    return max(figures, key=lambda found: found["tries"])


def table(kinds: dict[str, Any]) -> list[str]:
    rows = [
        f"| {NAMES[name]} | "
        + " | ".join(str(found[key]) for key in ("tries", "survived", "finished", "identical"))
        + " |"
        for name, found in kinds.items()
        if name != "requests"
    ]
    return ["| fault | tries | survived | finished | identical |", "|---|---|---|---|---|", *rows]


def most_first(counts: dict[str, int]) -> str:
    """Return each name with its count, the largest count first."""
    return ", ".join(f"{name} {n:,}" for name, n in sorted(counts.items(), key=lambda count: -count[1]))


def sentences(kinds: dict[str, Any]) -> list[str]:
    said = []
    killed = [kinds[name] for name in ("kill -9", "kill -9 served") if name in kinds]
    if killed:
        all_of_them = added(killed)
        victims = most_first(all_of_them["victims"])
        said += [
            f"After {all_of_them['tries']} kills ({victims}), {all_of_them['half_written']} half-written files stood "
            f"under their final names. In the {all_of_them['orphans_of']['tries']} kills after which processes were "
            f"counted, {all_of_them['orphans_of']['orphans']} were left two minutes later (a Snakemake whose command "
            "line was killed continues by design and is not counted).",
        ]
    full = [kinds[name] for name in ("disk full", "disk full late") if name in kinds]
    if full:
        all_of_them = added(full)
        where = most_first(all_of_them["where"])
        said += [
            f"Of {all_of_them['tries']} full disks, {all_of_them['sentence']} ended with the sentence and without a "
            f"traceback; {all_of_them['lost']} tables were lost in the {sum(all_of_them['where'].values())} in which "
            f"tables were counted. There the disk became full at: {where}.",
        ]
    if sent := kinds.get("requests"):
        statuses = most_first(sent["statuses"])
        before, after = sent["memory_mb"]["before"], sent["memory_mb"]["after"]
        said += [
            f"Of {sent['tries']:,} mutated requests to a server, four at a time ({statuses}), {sent['faults']} were a "
            f"fault of the server or hung; the slowest took {sent['slowest_s']} s. Its resident memory was {before} MB "
            f"after the first tenth and {after} MB at the end ({100 * (after / before - 1):+.0f} %).",
        ]
    return "\n\n".join(said).splitlines()
