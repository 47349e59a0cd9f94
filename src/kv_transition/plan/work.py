"""The jobs of an experiment and how many of them are done, from the configuration and the files."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kv_transition import specs
from kv_transition.plan.model_size import ModelSize
from kv_transition.plan.speed import Speed, on_gpu
from kv_transition.settings import Settings
from kv_transition.studies import registry
from kv_transition.studies.study import Item
from kv_transition.worker.client import workers_wanted


@dataclass(frozen=True)
class Work:
    settings: Settings
    items: tuple[Item, ...]
    documents: tuple[int, ...]
    """number of tokens of each prompt that is read once and stored"""
    notes: tuple[str, ...]

    def store_bytes(self, size: ModelSize) -> int:
        """Return the bytes of all prefills without the limit `prefill.max_gb`."""
        settings = self.settings
        statistics = specs.statistics(settings)
        return sum(size.stored_bytes(tokens, settings.model.dtype, statistics) for tokens in self.documents)


def work(settings: Settings, answer_tokens: dict[str, float] | None = None) -> Work:
    """Return all jobs with their counts; ``answer_tokens``: mean length of answers by task, if known."""
    found = [study.work(settings, answer_tokens or {}) for study in registry.studies()]
    return Work(
        settings,
        tuple(item for of_study in found for item in of_study.items),
        tuple(tokens for of_study in found for tokens in of_study.documents),
        tuple(note for of_study in found for note in of_study.notes),
    )


def outdated(settings: Settings) -> list[str]:
    """Return the files whose hash does not match the configuration, which must be run again."""
    return [job.path for item in work(settings).items for job in item.state["outdated"]]


def summary(made: Work, speed: Speed | None, size: ModelSize | None) -> dict[str, Any]:
    """Return the plan as plain values, in seconds and bytes; None for unknown ones."""
    remote = made.settings.engine.kind == "openai"
    speed = None if remote else speed  # the time of an endpoint is unknown
    items = {}
    warm = workers_wanted()
    loads = {"every": 0, "left": 0}  # loads counted so far, because one worker holds the model for jobs of all kinds
    for item in made.items:
        every, left = list(item.jobs), item.left
        own = {}
        for name, jobs in (("every", every), ("left", left)):
            own[name] = min(len(jobs), 1 - loads[name]) if warm else len(jobs)
            loads[name] += own[name]
        items[item.name] = {
            "unit": item.unit,
            "jobs": len(every),
            "done": len(item.state["done"]),
            "outdated": len(item.state["outdated"]),
            "units": sum(job.sequences for job in every),
            "seconds": None if speed is None else item.seconds(every, speed, own["every"]),
            "seconds_left": None if speed is None else item.seconds(left, speed, own["left"]),
            "bytes": item.bytes(every),
            "bytes_left": item.bytes(left),
        }
    left = None if speed is None else sum(item["seconds_left"] for item in items.values())
    return {
        "items": items,
        "device": "endpoint" if remote else "gpu" if on_gpu(made.settings) else "cpu",
        "hours_left": None if left is None else left / 3600,
        "speed": None if speed is None else speed.source,
        "store_bytes": None if size is None else made.store_bytes(size),
        "bytes_left": sum(item["bytes_left"] for item in items.values()),
        "notes": list(dict.fromkeys(made.notes)),
    }
