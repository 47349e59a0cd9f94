"""Report on an unfinished experiment: its finished cells, and a list of the missing ones."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from kv_transition import specs
from kv_transition.errors import UserError
from kv_transition.outputs.build import build_report
from kv_transition.paths import Paths
from kv_transition.provenance import digest, write_table, write_text
from kv_transition.settings import Settings
from kv_transition.studies.grid import specs as grid_specs
from kv_transition.studies.grid.analysis import adaptive, looks
from kv_transition.studies.grid.analysis.aggregate import write_aggregates
from kv_transition.studies.grid.analysis.transition import write_transition
from kv_transition.studies.grid.plots import FIGURE_NAMES, write_plots
from kv_transition.studies.grid.score import score_cells
from kv_transition.studies.grid.tables import SCORES

EXTRA = ("pairs", "noninferiority", "smallest_budgets", "budget_transition")


def write_partial(settings: Settings) -> Path:
    """Score, analyse and report the finished cells in ``{results}/{experiment}/partial/``; return the path of
    report.html.

    The files of the experiment itself are not changed. Cells that are missing, unreadable or computed with other
    settings or code are omitted and listed. Raises UserError if there is nothing to report yet.
    """
    import yaml

    files = Paths(settings.output.dir, settings.experiment)
    folder = Path(files.file("partial"))
    plan = settings.adaptive
    pieces = [files.shard(number) for number in range(len(plan.shards))] if plan.enabled else [files]
    expected, missing = {piece: {} for piece in pieces}, {}
    for task in settings.tasks:
        for key in grid_specs.cells(settings):
            wanted = digest(grid_specs.cell(settings, *key))
            for bin in range(settings.binning.n_bins):
                for number, piece in enumerate(pieces):
                    path = piece.cell(task, *key, bin)
                    why = _unfit(path, wanted)
                    if not why:
                        expected[piece][path] = wanted
                    elif number == 0 or Path(piece.bin(task, bin)).is_file():  # no look has requested the other shards
                        missing[str(Path(path).relative_to(files.root))] = why
    tasks = [t for t in settings.tasks if Path(files.manifest(t)).is_file()]
    manifests = [files.manifest(t) for t in tasks]
    if not any(expected.values()):
        raise UserError(f"{files.root}: this experiment has no finished cell yet; run some of its cells first")
    table = {name: str(folder / f"{name}.parquet") for name in ("scores", "bin_stats", "comparisons", "transition")}
    parts = []
    for number, (piece, cells) in enumerate(expected.items()):
        if cells:
            bins = [piece.bin(t, b) for t in tasks for b in range(settings.binning.n_bins)]
            full = any(f"/{specs.FULL}/{specs.FULL_BUDGET}/" in path for path in cells)
            parts.append(str(folder / f"scores/{number}.parquet"))
            score_cells(
                list(cells), [b for b in bins if Path(b).is_file()], manifests, cells, parts[-1],
                grid_specs.aliases(settings) if full else (),
            )  # fmt: skip
    write_table(table["scores"], *looks.joined(parts, SCORES))
    if not pq.read_metadata(table["scores"]).num_rows:
        raise UserError(f"{files.root}: the finished cells contain no answer yet; run more cells first")
    extra = {name: str(folder / f"{name}.parquet") for name in EXTRA}
    statistics = settings.statistics.model_dump()
    if plan.enabled:  # data collected since the last look use the level of the next look
        taken = sum(Path(files.allocation(look)).is_file() for look in range(len(pieces)))
        look = min(taken, len(pieces) - 1)
        statistics["confidence"] = adaptive.confidence(
            adaptive.Adaptive(**plan.model_dump()), look, settings.statistics.confidence
        )
    write_aggregates(
        table["scores"], table["bin_stats"], table["comparisons"], statistics, pairs_path=extra["pairs"],
        noninferiority_path=extra["noninferiority"], smallest_budgets_path=extra["smallest_budgets"],
    )  # fmt: skip
    write_transition(
        table["scores"], table["transition"], statistics, extra["budget_transition"], table["comparisons"],
        extra["noninferiority"],
    )  # fmt: skip
    plots = {f"{name}_svg": str(folder / f"plots/{name}.svg") for name in FIGURE_NAMES}
    write_plots(*table.values(), plots)
    resolved = Path(files.file("config.yaml"))
    text = resolved.read_text(encoding="utf-8") if resolved.is_file() else yaml.safe_dump(specs.resolved(settings))
    write_text(folder / "config.yaml", text)
    build_report(
        **table,
        manifests=manifests,
        config=str(folder / "config.yaml"),
        plots_dir=str(folder / "plots"),
        output_md=str(folder / "report.md"),
        output_html=str(folder / "report.html"),
        title=settings.report.title or settings.experiment,
        extra=extra,
        missing=missing,
    )
    return folder / "report.html"


def _unfit(path: str, wanted: str) -> str | None:
    """Return why a cell cannot be used, or None."""
    if not Path(path).is_file():
        return "not run yet"
    try:
        found = pq.read_table(path, columns=["cell_hash"], partitioning=None)["cell_hash"].unique().to_pylist()
    except (OSError, pa.ArrowException):
        return "not readable"
    return None if set(found) <= {wanted} else "computed with other settings or code"
