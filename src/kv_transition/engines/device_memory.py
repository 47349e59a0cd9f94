"""Memory in use on the GPUs of this machine by all processes, from NVML.

It serves to observe a server on this machine. The server's own share cannot be told apart, and a server that reserves
its cache at start shows a constant value.
"""

from __future__ import annotations

import threading
import time
from types import TracebackType
from typing import Any, Self

PERIOD_S = 0.05
_MB = 2**20


class Watch:
    """Samples the memory in use in the background while it is open; a machine without NVML has no samples."""

    def __init__(self, wanted: bool = True):
        self._nvml: Any = _nvml() if wanted else None
        self._samples: list[tuple[float, float]] = []
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Self:
        if self._nvml:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._nvml:
            self._over.set()
            self._thread.join()
            self._nvml.nvmlShutdown()

    def peak_mb(self, begin: float, end: float) -> float | None:
        """Return the highest sum over all GPUs between two times of time.perf_counter, in MB; None without samples."""
        inside = [used for at, used in list(self._samples) if begin <= at <= end]
        return max(inside) / _MB if inside else None

    def _run(self) -> None:
        handles = [self._nvml.nvmlDeviceGetHandleByIndex(i) for i in range(self._nvml.nvmlDeviceGetCount())]
        while handles and not self._over.wait(PERIOD_S):
            used = sum(self._nvml.nvmlDeviceGetMemoryInfo(handle).used for handle in handles)
            self._samples.append((time.perf_counter(), float(used)))


def _nvml() -> Any:
    """Return NVML, initialised; None if it is not available."""
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:  # not installed, no driver, no GPU: there is nothing to measure
        return None
    return pynvml
