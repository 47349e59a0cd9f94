"""Test that jobs run by a worker equal jobs run alone, whichever process is killed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kv_transition.worker import frames, runs
from kv_transition.worker.key import of_arguments, of_imports
from kv_transition.worker.place import place_of

TESTS = Path(__file__).parent
CALL = """
import json, os, sys
from kv_transition.worker.client import call
os.environ.setdefault("KVT_TEST", str(os.getpid()))
sys.exit(call(sys.argv[1], json.loads(sys.argv[2]), ["worker_jobs"]))
"""


def wait_for(what, seconds: float = 20.0):
    """Return the result of ``what`` as soon as it is true."""
    until = time.monotonic() + seconds
    while not (got := what()):
        assert time.monotonic() < until, "it never came true"
        time.sleep(0.02)
    return got


def is_there(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


class Machine:
    """Clients that connect to their workers in a separate folder."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.notes = folder / "notes"
        self.clients: list[subprocess.Popen] = []

    def environment(self, **more: str) -> dict[str, str]:
        own = {"XDG_RUNTIME_DIR": str(self.folder), "KVT_WORKER": "auto", "KVT_WORKER_IDLE_S": "5"}
        kept = {key: value for key, value in os.environ.items() if not key.startswith("KVT_")}
        return kept | own | {"PYTHONPATH": f"{TESTS.parent / 'src'}{os.pathsep}{TESTS}"} | more

    def call(self, function: str = "work", cwd: Path | None = None, environment=(), **arguments) -> subprocess.Popen:
        if function in ("work", "die_in_a_worker"):
            arguments = {"path": str(self.notes)} | arguments
        command = [sys.executable, "-c", CALL, f"worker_jobs:{function}", json.dumps(arguments)]
        client = subprocess.Popen(
            command, cwd=cwd, env=self.environment(**dict(environment)),
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.clients.append(client)
        return client

    def lines(self) -> list[list[str]]:
        """Return the notes of the jobs: process id, id of the parent process, a text."""
        return [line.split(" ", 2) for line in self.notes.read_text().splitlines()] if self.notes.exists() else []

    def begun(self) -> tuple[int, int]:
        """Return the process ids of the first job, once it has started, and of its worker."""
        job, worker, _ = wait_for(self.lines)[0]
        return int(job), int(worker)

    def workers(self) -> set[int]:
        found = set()
        for process in Path("/proc").glob("[0-9]*"):
            try:
                command = (process / "cmdline").read_bytes()
            except OSError:
                continue
            if b"kv_transition.worker.server" in command and str(self.folder).encode() in command:
                found.add(int(process.name))
        return {pid for pid in found if is_there(pid)}


@pytest.fixture
def machine():
    if not Path("/proc/self/stat").exists():
        pytest.skip("processes are looked up in /proc")
    # the path of a socket must be short
    made = Machine(Path(tempfile.mkdtemp(prefix="kvt", dir="/tmp")))
    yield made
    for client in made.clients:
        client.kill()
        client.communicate()
    for pid in made.workers():
        os.kill(pid, signal.SIGKILL)
    shutil.rmtree(made.folder)


def test_a_job_in_a_worker_has_the_output_the_folder_and_the_environment_of_its_client(machine, tmp_path):
    client = machine.call(cwd=tmp_path, environment={"KVT_TEST": "mine"})
    out, error = client.communicate(timeout=60)
    assert client.returncode == 0
    assert out == "to standard output\n"
    assert "to standard error\n" in error
    ((job, worker, text),) = machine.lines()
    assert text == f"{tmp_path} mine"
    assert {int(job), int(worker)}.isdisjoint({client.pid})
    assert machine.workers() == {int(worker)}


@pytest.mark.parametrize(("how", "status", "said"), [("input", 2, "row 3"), ("status", 7, ""), ("bug", 1, "a bug")])
def test_a_job_fails_as_it_would_by_itself(machine, how, status, said):
    for worker in ("auto", "never"):
        client = machine.call("fail", how=how, environment={"KVT_WORKER": worker})
        _, error = client.communicate(timeout=60)
        assert client.returncode == status
        assert said in error
        assert ("Traceback" in error) == (how == "bug")


def test_clients_that_come_at_once_start_one_worker_and_are_served_side_by_side(machine):
    clients = [machine.call(seconds=1.0) for _ in range(6)]
    wait_for(lambda: len(machine.lines()) == 6)
    assert all(client.poll() is None for client in clients)  # all are running
    assert [client.wait(60) for client in clients] == [0] * 6
    assert {int(worker) for _, worker, _ in machine.lines()} == machine.workers()
    assert len(machine.workers()) == 1


def test_never_is_by_itself_and_other_words_are_refused(machine):
    """Check that KVT_WORKER=never runs the job in the client, and that other words are refused."""
    client = machine.call(environment={"KVT_WORKER": "never"})
    client.communicate(timeout=60)
    assert int(machine.lines()[0][0]) == client.pid
    refused = machine.call(environment={"KVT_WORKER": "sometimes"})
    assert "KVT_WORKER: 'sometimes' is not allowed; set it to auto or never" in refused.communicate(timeout=60)[1]
    assert not machine.workers()


@pytest.mark.parametrize("how", ["memory", "killed"])
def test_a_job_that_dies_in_a_worker_is_carried_out_by_its_client(machine, how):
    neighbour = machine.call(seconds=3.0)
    machine.begun()
    client = machine.call("die_in_a_worker", how=how)
    _, error = client.communicate(timeout=60)
    assert client.returncode == 0, error
    assert "so the job runs in its own process" in error
    assert int(machine.lines()[-1][0]) == client.pid
    assert neighbour.wait(60) == 0
    assert len(machine.lines()) == 3  # the other client's job was not run again


def test_jobs_of_a_killed_worker_end_with_it_and_are_carried_out_by_their_clients(machine):
    client = machine.call(seconds=2.0)
    job, worker = machine.begun()
    os.kill(worker, signal.SIGKILL)
    wait_for(lambda: not is_there(job), 5)
    _, error = client.communicate(timeout=60)
    assert client.returncode == 0, error
    assert int(machine.lines()[-1][0]) == client.pid
    # a stale socket does not prevent a new worker
    assert machine.call().wait(60) == 0
    assert len(machine.workers()) == 1


def test_a_terminated_worker_leaves_its_jobs_to_their_clients(machine):
    client = machine.call(seconds=2.0)
    job, worker = machine.begun()
    os.kill(worker, signal.SIGTERM)
    _, error = client.communicate(timeout=60)
    assert client.returncode == 0, error
    assert int(machine.lines()[-1][0]) == client.pid
    wait_for(lambda: not is_there(job) and not machine.workers())


def test_the_job_of_a_killed_client_ends_and_the_worker_stays(machine):
    client = machine.call(seconds=60.0)
    job, worker = machine.begun()
    client.kill()
    wait_for(lambda: not is_there(job))
    assert machine.lines()[-1][2] == "tidied up"
    assert machine.workers() == {worker}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_client_waits_until_its_job_has_tidied_up(machine, number):
    client = machine.call(seconds=60.0)
    job, _ = machine.begun()
    client.send_signal(number)
    assert client.wait(20) == 130
    assert not is_there(job)
    assert machine.lines()[-1][2] == "tidied up"


def test_jobs_and_worker_end_when_their_run_does(machine):
    """Check the case in which Snakemake is killed while the shells that it started continue."""
    run = subprocess.Popen(["sleep", "600"])
    named = f"{os.uname().nodename}:{run.pid}:{runs._started(run.pid)}"
    client = machine.call(seconds=60.0, environment={"KVT_RUN": named})
    job, worker = machine.begun()
    run.kill()
    run.wait()
    assert client.wait(20) == 130
    wait_for(lambda: not is_there(job) and not is_there(worker), 20)
    assert not list(machine.folder.glob("*/*.sock"))


def test_a_worker_without_work_ends(machine):
    assert machine.call(environment={"KVT_WORKER_IDLE_S": "1"}).wait(60) == 0
    assert machine.workers()
    wait_for(lambda: not machine.workers())
    assert not list(machine.folder.glob("*/*.sock"))


def test_what_is_no_client_disturbs_nobody(machine):
    """Check that invalid messages on the socket do not disturb the worker."""
    assert machine.call().wait(60) == 0
    (path,) = machine.folder.glob("*/*.sock")
    for nonsense in (b"", b"\xff\xff\xff\xff", b"\x00\x00\x00\x02[]", b"\x00\x00\x00\x04null", b"\x80\x04N."):
        with socket.socket(socket.AF_UNIX) as stranger:
            stranger.connect(str(path))
            stranger.sendall(nonsense)
    assert machine.call().wait(60) == 0
    assert len(machine.workers()) == 1


def test_nobody_else_can_enter_the_folder(machine):
    assert machine.call().wait(60) == 0
    (folder,) = machine.folder.glob("kvt-*")
    assert folder.stat().st_mode & 0o777 == 0o700
    assert all(file.stat().st_mode & 0o077 == 0 for file in folder.glob("*.sock"))


def test_a_folder_that_others_can_enter_or_have_laid_there_is_not_used(tmp_path, monkeypatch):
    parent = Path(tempfile.mkdtemp(dir="/tmp"))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(parent))
    monkeypatch.setenv("TMPDIR", str(parent))
    folder = parent / f"kvt-{os.getuid()}"
    folder.mkdir(mode=0o755)
    assert place_of("a").folder != folder
    folder.rmdir()
    folder.symlink_to(tmp_path)
    assert place_of("a").folder != folder
    folder.unlink()
    assert place_of("a").folder == folder
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / ("long" * 30)))  # too long for the path of a socket
    assert place_of("a").folder == folder
    shutil.rmtree(parent)


def _spec(**changes) -> list[str]:
    model = {"name": "m", "dtype": "float32", "device": "cpu", "fingerprint": "f"} | changes.pop("model", {})
    return ["--spec", json.dumps({"model": model} | changes)]


def test_a_worker_is_named_by_all_that_it_holds(monkeypatch, tmp_path):
    def name(**changes) -> str:
        return of_arguments("any", _spec(**changes)).name

    first = name()
    assert name(policy="another", budget="r0.5") == first
    for change in ({"dtype": "bfloat16"}, {"fingerprint": "g"}, {"device": "cuda"}, {"attn_implementation": "x"}):
        assert name(model=change) != first
    # the policy of a user matters only if one process runs all jobs
    assert name(policy_content="p") == first
    assert name(model={"device": "cuda"}, policy_content="p") != name(model={"device": "cuda"})
    for variable in ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "SLURM_JOB_ID", "HF_HOME"):
        with monkeypatch.context() as patch:
            patch.setenv(variable, "17")
            assert name() != first
    monkeypatch.setenv("KVT_STATISTICS", "attn_sum")
    assert name() == first
    (tmp_path / "kv_transition").mkdir()
    (tmp_path / "kv_transition" / "a.py").write_text("x = 1\n")
    monkeypatch.setattr("kv_transition.worker.key.PACKAGE", tmp_path / "kv_transition")
    edited = name()
    (tmp_path / "kv_transition" / "a.py").write_text("x = 2\n")
    assert len({first, edited, name()}) == 3
    assert of_imports(["a", "b"]).name == of_imports(["b", "a"]).name


@pytest.mark.parametrize("arguments", [[], ["--spec"], ["--spec", "{"], ["--spec", "{}"], ["--spec", '{"model": 3}']])
def test_a_job_without_a_model_has_no_worker(arguments):
    assert of_arguments("any", arguments) is None


def test_a_process_of_the_same_number_is_not_the_same_run():
    mine = runs.current()
    assert runs.is_alive(mine)
    host, pid, start = mine.rsplit(":", 2)
    assert not runs.is_alive(f"{host}:{pid}:{int(start) - 1}")
    assert not runs.is_alive(f"elsewhere:{pid}:{start}")
    ended = subprocess.Popen(["true"])
    ended.wait()
    assert not runs.is_alive(f"{host}:{ended.pid}:{start}")


@given(st.dictionaries(st.text(), st.recursive(st.none() | st.integers() | st.text(), st.lists, max_leaves=5)))
def test_values_arrive_as_they_were_sent(value):
    ours, theirs = socket.socketpair()
    with ours, theirs:
        frames.send(ours, value)
        assert frames.receive(theirs) == (value, [])


def test_what_is_cut_off_or_too_long_is_no_value():
    ours, theirs = socket.socketpair()
    with theirs:
        with ours:
            ours.sendall(b"\x00\x00\x00\x09{}")
        assert frames.receive(theirs) is None
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.sendall(b"\x7f\xff\xff\xff")
        with pytest.raises(ValueError, match="bytes"):
            frames.receive(theirs)
