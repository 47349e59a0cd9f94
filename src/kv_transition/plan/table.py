"""The plan as a table on the screen."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from kv_transition.cache import disk
from kv_transition.settings import Settings


def size(n: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if n < 1000:
            return f"{n:.0f} {unit}" if n >= 10 or unit == "B" else f"{n:.1f} {unit}"
        n /= 1000
    return f"{n:.1f} TB"


def duration(seconds: float) -> str:
    """Return a duration as text, in hours if it is long, because clusters account in hours."""
    if seconds >= 3600:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 60:.0f} min" if seconds >= 60 else f"{seconds:.0f} s"


def show(settings: Settings, plan: dict[str, Any], console: Console) -> None:
    table = Table(title=f"experiment {settings.experiment}", title_justify="left", box=None, padding=(0, 1))
    for head in ("", "jobs", "there", "outdated", "holding", "time left", "disk left"):
        table.add_column(head, justify="right" if head else "left", no_wrap=True)
    for name, item in plan["items"].items():
        table.add_row(
            name,
            f"{item['jobs']:,}",
            f"{item['done']:,}",
            f"{item['outdated']:,}",
            f"{item['units']:,} {item['unit']}",
            "unknown" if item["seconds_left"] is None else duration(item["seconds_left"]),
            size(item["bytes_left"]),
        )
    console.print(table)
    for line in lines(settings, plan):
        console.print(line, highlight=False, soft_wrap=True)


def lines(settings: Settings, plan: dict[str, Any]) -> list[str]:
    """Return the sentences below the table."""
    said = []
    if plan["device"] == "endpoint":
        said.append(f"Time: that of the endpoint ({settings.engine.base_url}); no local GPU is needed.")
    elif plan["hours_left"] is None:
        said.append("Time: unknown, because there are neither results nor the model's config.json; try --calibrate.")
    else:
        kind = "GPU-hours" if plan["device"] == "gpu" else "core hours"
        said.append(f"Time left: {plan['hours_left']:.2f} {kind} ({plan['speed']}).")
    free = size(disk.usage(settings.output.dir).free)
    if settings.tasks and plan["device"] != "endpoint":
        said.append(_store(settings, plan["store_bytes"]))
    said.append(f"Disk: {size(plan['bytes_left'])} of answers are still to be written; {free} are free.")
    return said + [f"Note: {note}." for note in plan["notes"]]


def _store(settings: Settings, needed: int | None) -> str:
    if settings.prefill.store == "never":
        return "Prefills: not stored (prefill.store: never)."
    if needed is None:
        return "Prefills: their size is unknown without the model's config.json."
    bound = settings.prefill.max_gb * 1e9
    if needed <= bound:
        return f"Prefills: {size(needed)} if all are stored."
    return f"Prefills: {size(needed)} in total, of which prefill.max_gb keeps {size(bound)}; the rest is read again."
