"""Common settings of all tests: one torch thread, and a message about tests that need real data."""

from __future__ import annotations

import os

import pytest


def pytest_configure(config):
    # Set this before torch is imported: tests run in parallel, and two threads per process would compete for the cores.
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_ignore_collect(collection_path, config):
    # A GPU machine has few packages besides torch, so the other test files cannot be imported there.
    if config.option.markexpr == "gpu" and collection_path.suffix == ".py" and "gpu" not in collection_path.stem:
        return True
    return None


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """Return a separate checkout in which a small experiment has run up to its report. Tests must not change it."""
    from project import Project

    project = Project(tmp_path_factory.mktemp("finished"))
    project.run()
    return project


@pytest.fixture(scope="session")
def kvt_data():
    """Return the folder of real data that KVT_DATA names. Tests that need it are skipped if it is not set."""
    from pathlib import Path

    folder = os.environ.get("KVT_DATA")
    if not folder:
        pytest.skip("real-input test: set KVT_DATA to the folder of real data")
    return Path(folder).resolve()
