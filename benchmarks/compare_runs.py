"""Compare the tables of two runs of one experiment, without measured values.

    python benchmarks/compare_runs.py FOLDER OTHER

The folders are ``results/{experiment}`` of two checkouts, for example one that ran with ``KVT_WORKER=never``. Every
Parquet file is compared, rows in the order of the file. Times, memory and the engine's raw answer are not compared.
Prints one line for each difference; the exit status is 1 if there is one.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import polars as pl

MEASURED = re.compile(r"(_s|_mb|_at)$|^(raw|seconds|co_running)$|latency|ttft|tokens_per_s|speedup")
"""columns and metrics that hold times, memory or the number of concurrent jobs"""


def compared(path: Path) -> pl.DataFrame:
    """Return a table without measured columns and without rows about a measured metric."""
    table = pl.read_parquet(path)
    kept = table.select(name for name in table.columns if not MEASURED.search(name))
    for name in ("metric", "statistic"):
        if name in kept.columns:
            kept = kept.filter(~pl.col(name).cast(pl.String).str.contains(MEASURED.pattern))
    return kept


def difference(one: pl.DataFrame, other: pl.DataFrame) -> str | None:
    """Return a description of the differences, None if there are none; floats must be equal bit for bit."""
    if one.schema != other.schema:
        return f"columns or types differ: {sorted(set(one.schema.items()) ^ set(other.schema.items()), key=str)}"
    if one.height != other.height:
        return f"{one.height} and {other.height} rows"
    changed = [name for name in one.columns if not one[name].equals(other[name], null_equal=True)]
    return f"other values in {', '.join(changed)}" if changed else None


def main() -> int:
    one, other = map(Path, sys.argv[1:3])
    found = {folder: {str(p.relative_to(folder)) for p in folder.rglob("*.parquet")} for folder in (one, other)}
    differences = [f"{name}: in one of them only" for name in sorted(found[one] ^ found[other])]
    common = sorted(found[one] & found[other])
    for name in common:
        said = difference(compared(one / name), compared(other / name))
        differences += [f"{name}: {said}"] if said else []
    print("\n".join(differences))
    print(f"{len(common)} tables compared, {len(differences)} differences")
    return bool(differences) or not common


if __name__ == "__main__":
    sys.exit(main())
