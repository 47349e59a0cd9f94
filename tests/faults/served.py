"""The same experiment through a server of this project, which can be killed and restarted at the same address."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from faults.experiment import TINY, Experiment

FILE, PLACE = "served.yaml", "served"


@contextmanager
def running(experiment: Experiment) -> Iterator[Server]:
    """Yield a server that runs until the block ends."""
    server = Server(experiment)
    try:
        yield server
    finally:
        server.kill()


class Server:
    """`kv_transition serve` with the embedded model, at a fixed address."""

    def __init__(self, experiment: Experiment):
        self._experiment = experiment
        with socket.create_server(("127.0.0.1", 0)) as free:
            self._port = free.getsockname()[1]
        self.starts = 0
        self.process = self._started()
        engine = {"kind": "openai", "base_url": self.url, "serves": "kv_transition", "model": "tiny-reader"}
        experiment.configure(PLACE, FILE, engine=engine, prefill=TINY["prefill"] | {"store": "auto"})
        experiment.learn(PLACE, FILE)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}/v1"

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def again(self, after_s: float) -> None:
        """Start the server again after ``after_s`` seconds, and wait until it listens."""
        time.sleep(after_s)
        self.process = self._started()

    def _started(self) -> subprocess.Popen:
        self.starts += 1
        model = self._experiment.folder / "resources/tiny-reader"
        command = [sys.executable, "-m", "kv_transition", "serve", "--model", model, "--name", "tiny-reader"]
        command += ["--port", str(self._port), "--device", "cpu", "--threads", "1"]
        # outside the folder of the runs, so that it does not count as a process of a run
        process = subprocess.Popen(
            command, cwd=self._experiment.folder.parent, env=self._experiment.environment, stderr=subprocess.DEVNULL
        )
        while True:
            if process.poll() is not None:
                raise SystemExit("the server does not start")
            try:
                socket.create_connection(("127.0.0.1", self._port), timeout=1).close()
                return process
            except OSError:
                time.sleep(0.1)
