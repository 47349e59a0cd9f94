"""The fault campaign: run a small experiment under faults, and check that it ends with the same tables each time.

python -m tests.faults --output FILE.json            # all of it: an hour or two on one core
python -m tests.faults --kills 3 --served-kills 2 --disks 0 --requests 200 --others two_on_one     # in the tests
python -m tests.faults --docs FILE.json --output benchmarks/results/2026-11-30-faults.json

The last command adds a campaign to the stored campaigns and writes the sums into docs/reliability.md.

The figures for each kind are the number of tries, the number of tries after which a plain rerun continued
(``survived``), and how many of the finished runs (``finished``) had the tables of an undisturbed run (``identical``).
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2] / "src")]

from faults import disks, kills, others, page, requests, served  # noqa: E402
from faults.experiment import Experiment  # noqa: E402

from kv_transition.provenance import git_commit, write_json  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=70, help="times that something is killed")
    parser.add_argument("--served-kills", type=int, default=30, help="the same with a server: it, a client, or all")
    parser.add_argument("--disks", type=int, default=20, help="times that the disk is full (as root: it mounts one)")
    parser.add_argument("--requests", type=int, default=6000, help="mutated requests to a server")
    parser.add_argument("--others", default="all", help=f"all, none, or names of {', '.join(others.KINDS)}")
    parser.add_argument("--step", default="all", help="command of the command line that is run: score ends early")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="where to work; a temporary folder unless given")
    parser.add_argument("--output", type=Path, help="JSON file with the figures")
    parser.add_argument("--docs", type=Path, nargs="+", help="keep the campaigns of these files instead, in --output")
    arguments = parser.parse_args()
    if arguments.docs:
        page.write(arguments.docs, arguments.output)
        return 0
    chosen = {"all": [*others.KINDS], "none": []}.get(arguments.others, arguments.others.split(","))
    rng, started, found = random.Random(arguments.seed), time.time(), {}

    def record(name: str, figures: dict) -> None:
        found[name] = figures
        print(f"{time.time() - started:6.0f} s  {name}: {json.dumps(figures)}", flush=True)
        if arguments.output:
            facts = {"commit": git_commit(), "date": datetime.now(UTC).date().isoformat(), "seed": arguments.seed}
            write_json(arguments.output, facts | {"seconds": round(time.time() - started), "kinds": found})

    def recorder(name: str) -> Callable[[dict], None]:
        return lambda figures: record(name, figures)

    with tempfile.TemporaryDirectory(prefix="kvt-faults-") as temporary:
        experiment = Experiment((arguments.folder or Path(temporary)).absolute(), arguments.step)
        if arguments.served_kills:
            with served.running(experiment) as server:
                campaign = kills.Campaign(experiment, rng, server)
                campaign.kill(arguments.served_kills, recorder("kill -9 served"))
        late = arguments.disks // 2
        if late:
            disks.Disks(experiment, rng).fill(late, recorder("disk full late"), late=True)
        if arguments.kills:
            kills.Campaign(experiment, rng).kill(arguments.kills, recorder("kill -9"))
        if early := arguments.disks - late:
            disks.Disks(experiment, rng).fill(early, recorder("disk full"), late=False)
        for name in chosen:
            record(name, others.KINDS[name](experiment))
    if arguments.requests:
        record("requests", requests.fuzz(arguments.requests, rng))
    return 0 if all(map(_good, found.values())) else 1


def _good(figures: dict) -> bool:
    if "memory_mb" in figures:
        memory = figures["memory_mb"]
        return figures["healthy"] and not figures["faults"] and memory["after"] <= 1.2 * memory["before"]
    return figures["identical"] == figures["finished"] and not figures.get("left")


if __name__ == "__main__":
    sys.exit(main())
