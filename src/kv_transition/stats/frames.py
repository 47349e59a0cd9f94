"""Readers of Parquet files as polars frames."""

from __future__ import annotations

import os
from collections.abc import Sequence

import polars as pl
import polars.selectors as cs

from kv_transition.errors import UserError
from kv_transition.parsing import damaged


def read_parquet(path: str | os.PathLike[str], columns: Sequence[str] | None = None) -> pl.DataFrame:
    """Return a Parquet file as a frame. Raises UserError if it is damaged, missing or lacks one of ``columns``."""
    try:
        return pl.read_parquet(path, columns=None if columns is None else list(columns))
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException, OSError) as error:
        raise UserError(damaged(path, error)) from None


def read_table(path: str) -> pl.DataFrame:
    """Return a Parquet file as a frame, with null instead of NaN."""
    return read_parquet(path).with_columns(cs.float().fill_nan(None))
