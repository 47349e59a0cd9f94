"""The job ``shard``: write a part of a bin, in the order in which its examples were chosen.

``python -m kv_transition.data.shard --bin BIN.parquet --begin N --end N --output BIN.parquet``
"""

from __future__ import annotations

import argparse

from kv_transition import parsing
from kv_transition.provenance import read_metadata, write_table


def cut(bin_path: str, begin: int, end: int, output: str) -> None:
    """Write the examples ``begin`` to ``end`` (counted from 0, ``end`` excluded) of a bin file; none if the bin is
    shorter.
    """

    write_table(
        output, parsing.read_parquet(bin_path, partitioning=None).slice(begin, end - begin), read_metadata(bin_path)
    )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--bin", required=True)
    parser.add_argument("--begin", type=int, required=True)
    parser.add_argument("--end", type=int, required=True)
    parser.add_argument("--output", required=True)
    args = parser.parse_args(argv)
    cut(args.bin, args.begin, args.end, args.output)


if __name__ == "__main__":
    main()
