"""Tables from disk as polars frames."""

from __future__ import annotations

import polars as pl
import polars.selectors as cs


def read_table(path: str) -> pl.DataFrame:
    """Return one Parquet table, with null in the place of NaN."""
    return pl.read_parquet(path).with_columns(cs.float().fill_nan(None))
