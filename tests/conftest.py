"""Common settings of all tests: one torch thread, and a message about tests that need real data."""

from __future__ import annotations

import os

import pytest


def pytest_configure(config):
    # Before torch is imported: tests run side by side, and two threads a process would fight for the cores.
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_ignore_collect(collection_path, config):
    # A GPU machine has torch and little else: there the other files cannot even be imported.
    if config.option.markexpr == "gpu" and collection_path.suffix == ".py" and "gpu" not in collection_path.stem:
        return True
    return None


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """A checkout of its own with a small experiment, run to its report. Tests leave it as it is."""
    from project import Project

    project = Project(tmp_path_factory.mktemp("finished"))
    project.run()
    return project


@pytest.fixture(scope="session")
def kvt_data():
    """The folder of real data named by KVT_DATA; tests that need it are skipped without."""
    from pathlib import Path

    folder = os.environ.get("KVT_DATA")
    if not folder:
        pytest.skip("real-input test: set KVT_DATA to the folder of real data")
    return Path(folder).resolve()
