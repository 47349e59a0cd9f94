"""Test prefills on disk: loaded as they were stored, completely or not at all; the disk is never filled."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import shutil
import time
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from states import identical, random_prefill

from kv_transition.cache import file as cache_file
from kv_transition.cache import store as store_module
from kv_transition.cache.state import STATISTICS, CacheState
from kv_transition.cache.store import Prefill, PrefillStore
from kv_transition.errors import UserError

FACTS = {"dtype": "float32", "tokenizer": "abc", "model": "def"}


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda _: None)
    store_module._say_once.cache_clear()


@pytest.fixture
def prefill():
    return random_prefill(["plain", "window", "room"])


@pytest.fixture
def store(tmp_path):
    return PrefillStore(tmp_path / "model", "always", facts=FACTS)


def without(prefill: Prefill, statistics: frozenset[str]) -> Prefill:
    def poorer(state: CacheState) -> CacheState:
        return replace(state, layers=tuple(layer.without(statistics) for layer in state.layers))

    return replace(prefill, context=poorer(prefill.context), prompt=poorer(prefill.prompt))


def stored(store: PrefillStore) -> list[str]:
    return sorted(file.stem for file in store.root.glob("*.safetensors"))


def size_gb(store: PrefillStore, name: str) -> float:
    return store.path(name).stat().st_size / 1e9


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    kinds=st.lists(st.sampled_from(["plain", "room", "window"]), min_size=1, max_size=4),
    context=st.integers(1, 20),
    question=st.integers(0, 6),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    statistics=st.frozensets(st.sampled_from(sorted(STATISTICS))),
    heads=st.integers(1, 3),
    seed=st.integers(0, 1000),
)
def test_what_comes_back_is_what_was_stored(tmp_path, kinds, **shape):
    store = PrefillStore(tmp_path / "model", "always")
    prefill = random_prefill(["plain", *kinds], **shape)
    assert store.save("abc", prefill)
    assert "abc" in store
    assert store.statistics("abc") == shape["statistics"]
    back = store.load("abc")
    assert identical(back.context, prefill.context)
    assert identical(back.prompt, prefill.prompt)
    assert (back.context_s, back.question_s) == (prefill.context_s, prefill.question_s)


def test_both_moments_share_their_keys_and_values(store):
    n, heads, d = 500, 2, 8
    prefill = random_prefill(["plain"] * 3, n - 100, 100, statistics=frozenset())
    store.save("abc", prefill)
    tensors = load_file(store.path("abc"))
    assert sum(t.nbytes for name, t in tensors.items() if "logits" not in name) == 3 * 2 * heads * n * d * 4
    back = store.load("abc")
    assert back.context.layers[0].keys.data_ptr() == back.prompt.layers[0].keys.data_ptr()


def test_a_mode_loads_the_statistics_that_it_asks_for(store):
    prefill = random_prefill(["plain", "window"], statistics=frozenset({"attn_sum", "recent_queries"}))
    store.save("abc", prefill)
    back = store.load("abc", statistics=frozenset({"attn_sum"})).prompt
    assert identical(back.layers[0], prefill.prompt.layers[0].without(frozenset({"recent_queries"})))
    assert store.load("abc", statistics=frozenset()).context.layers[0].attn_sum is None


def test_one_without_what_is_asked_for_is_read_again_and_replaced(store):
    """Check that a prefill without a requested statistic is a miss and can be replaced."""
    poor = random_prefill(["plain"], statistics=frozenset({"attn_sum"}))
    rich = random_prefill(["plain"])
    store.save("abc", poor)
    assert store.load("abc", statistics=frozenset({"attn_sum", "query_cov"})) is None
    assert store.save("abc", rich)
    assert identical(store.load("abc", statistics=STATISTICS).prompt, rich.prompt)


def test_what_is_not_there_is_none(store):
    assert store.load("nothing") is None
    assert store.statistics("nothing") is None
    assert "nothing" not in store


def test_never_neither_stores_nor_reads(tmp_path, store, prefill):
    never = PrefillStore(store.root, "never", facts=FACTS)
    assert not never.save("abc", prefill)
    assert not store.root.exists()
    store.save("abc", prefill)
    assert never.load("abc") is None


# a damaged or foreign file


@pytest.mark.parametrize("damage", [b"", b"not tensors", None])
def test_a_damaged_file_is_named(store, prefill, damage):
    store.save("abc", prefill)
    file = store.path("abc")
    file.write_bytes(file.read_bytes()[:-100] if damage is None else damage)
    for read in (store.load, store.statistics):
        with pytest.raises(UserError, match="incomplete or damaged; delete it, so that it is computed again") as error:
            read("abc")
        assert str(file) in str(error.value)


@pytest.mark.parametrize("name", sorted(FACTS))
def test_a_prefill_of_another_model_is_named(store, prefill, name):
    store.save("abc", prefill)
    other = replace(store, facts=FACTS | {name: "other"})
    with pytest.raises(UserError, match=rf"another {name} \({FACTS[name]}, not other\); delete it"):
        other.load("abc")


def test_a_file_of_something_else_is_named(store):
    store.root.mkdir()
    save_file({"weights": torch.zeros(3)}, store.path("abc"))
    with pytest.raises(UserError, match="'something else'; delete it"):
        store.load("abc")


# a full disk


def full_disk(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_is_said_in_one_sentence_and_leaves_nothing(store, prefill, monkeypatch):
    monkeypatch.setattr("kv_transition.provenance.os.fsync", full_disk)
    with pytest.raises(
        UserError, match=r"\(No space left on device\); free some disk space or set prefill.store to never"
    ):
        store.save("abc", prefill)
    assert list(store.root.iterdir()) == []


def test_auto_goes_on_without_storing_when_the_disk_is_full(store, prefill, monkeypatch, capsys):
    monkeypatch.setattr("kv_transition.provenance.os.fsync", full_disk)
    auto = replace(store, mode="auto")
    assert not auto.save("abc", prefill)
    assert not auto.save("def", prefill)
    assert list(store.root.iterdir()) == []
    assert capsys.readouterr().err == f"{store.root}: No space left on device; not every prompt is stored\n"


def test_auto_raises_any_other_error(store, prefill, monkeypatch):
    def broken(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr("kv_transition.provenance.os.fsync", broken)
    with pytest.raises(UserError, match="Input/output error"):
        replace(store, mode="auto").save("abc", prefill)


def disk_of(total, free):
    """Return a stand-in for `shutil.disk_usage`."""
    usage = type(shutil.disk_usage("/"))
    return lambda _: usage(total=total, used=total - free, free=free)


def test_auto_leaves_a_tenth_of_a_small_disk_free(store, prefill, monkeypatch, capsys):
    auto = replace(store, mode="auto")
    monkeypatch.setattr(shutil, "disk_usage", disk_of(total=1000_000, free=105_000))
    assert not auto.save("large", random_prefill(["plain"], 200))
    assert auto.save("small", random_prefill(["plain"], 5, statistics=frozenset()))
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "free some disk space or set prefill.store to always" in said


@pytest.mark.parametrize(("free_gb", "stored"), [(50, True), (11, True), (9, False)])
def test_auto_leaves_ten_gigabytes_of_a_large_disk_free(store, prefill, monkeypatch, free_gb, stored):
    monkeypatch.setattr(shutil, "disk_usage", disk_of(total=10 * 10**12, free=free_gb * 10**9))
    assert replace(store, mode="auto").save("abc", prefill) is stored


# time saved


def test_auto_stores_while_reading_back_is_quicker_than_reading_the_prompt(store, prefill, monkeypatch):
    monkeypatch.setattr(store_module, "_read_s", lambda path: path.stat().st_size / 1e6)  # 1 MB per second
    auto = replace(store, mode="auto")
    slow, quick = (random_prefill(["plain"], 20, seconds=s) for s in (1.0, 1e-4))
    assert auto.save("first", quick), "the first is stored to find out"
    assert auto.save("slow", slow)
    assert not auto.save("quick", quick)
    assert store.save("quick", quick), "always does not weigh"


def test_the_speed_is_measured_once_for_a_host_and_anew_for_much_larger_files(store, monkeypatch):
    measured = []
    monkeypatch.setattr(store_module, "_read_s", lambda path: measured.append(path.stem) or 1e-6)
    auto = replace(store, mode="auto")
    for name, n in (("a", 50), ("b", 60), ("c", 1000), ("d", 50)):
        auto.save(name, random_prefill(["plain"], n, statistics=frozenset()))
    assert measured == ["a", "c"]
    monkeypatch.setattr("platform.node", lambda: "elsewhere")
    auto.save("e", random_prefill(["plain"], 50))
    assert measured == ["a", "c", "e"]


def test_the_speed_is_that_of_the_file(store, prefill):
    replace(store, mode="auto").save("abc", prefill)
    (file,) = store.root.parent.glob("read-speed-*.json")
    speed = json.loads(file.read_text())["bytes_per_second"]
    assert 1e3 < speed < 1e12


# maximum size


@pytest.mark.parametrize("mode", ["always", "auto"])
def test_the_least_recently_used_goes_first(store, prefill, mode):
    store.save("a", prefill)
    limited = replace(store, mode=mode, max_gb=3.5 * size_gb(store, "a"))
    for age, name in enumerate("bc"):
        limited.save(name, prefill)
        os.utime(store.path(name), (age, age))
    os.utime(store.path("a"), (5, 5))
    assert limited.load("b") is not None  # marks it as used
    assert limited.save("d", prefill)
    assert stored(store) == ["a", "b", "d"]
    assert limited.save("e", prefill)
    assert stored(store) == ["b", "d", "e"]


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    actions=st.lists(
        st.tuples(st.sampled_from(["save", "load"]), st.integers(0, 5), st.sampled_from([3, 40, 120])), max_size=20
    ),
    files=st.floats(0.5, 4),
)
# a larger "0" is refused; the earlier, smaller "0" is still the least recently used
@example(actions=[("save", 0, 3), ("save", 1, 3), ("save", 0, 120), ("save", 2, 3)], files=0.5)
def test_the_store_stays_below_its_size_and_behaves_as_a_list_in_order_of_use(tmp_path, actions, files):
    """Compare with a list of (name, size) in order of use, the last used at its end."""
    shutil.rmtree(tmp_path / "store", ignore_errors=True)
    limit = int(files * 40_000)
    store = PrefillStore(tmp_path / "store" / "model", "always", max_gb=limit / 1e9)
    held: list[tuple[str, int]] = []
    clock = iter(range(1, 1000))
    for action, number, n in actions:
        name, used = str(number), False
        if action == "save":
            # saves in a test have almost equal times, so the order is set explicitly
            if used := store.save(name, random_prefill(["plain"], n)):
                size = store.path(name).stat().st_size
                held = [(other, s) for other, s in held if other != name]
                while sum(s for _, s in held) + size > limit:
                    held.pop(0)
                held.append((name, size))
        elif used := store.load(name) is not None:
            held.sort(key=lambda entry: entry[0] == name)
        if used:  # a refused save does not count as a use of the smaller file of the same name
            moment = next(clock)
            os.utime(store.path(name), (moment, moment))
        assert stored(store) == sorted(name for name, _ in held)
        assert sum(file.stat().st_size for file in store.root.glob("*")) <= limit


def test_one_that_does_not_fit_at_all_is_said_once_and_removes_nothing(store, prefill, capsys):
    store.save("a", random_prefill(["plain"], 1))
    small = replace(store, max_gb=1.5 * size_gb(store, "a"))
    large = random_prefill(["plain"], 500)
    assert not small.save("b", large)
    assert not small.save("c", large)
    assert stored(store) == ["a"]
    assert capsys.readouterr().err.count("prefill.max_gb") == 1


def test_all_models_share_the_size_and_indexes_and_unfinished_files_are_left(store, prefill):
    store.save("a", prefill)
    limited = replace(store, root=store.root.parent / "other", max_gb=1.5 * size_gb(store, "a"))
    unfinished = store.root / ".b.safetensors.xyz.safetensors"
    unfinished.write_bytes(b"x" * 100)
    os.utime(unfinished, (1, 1))
    index = store.root / "bin0.json"
    index.write_bytes(b"x" * 1_000_000)
    assert limited.save("c", prefill)
    assert stored(limited) == ["c"]
    assert sorted(store.root.iterdir()) == sorted([unfinished, index])


def test_one_that_another_job_stored_meanwhile_is_counted(store, prefill, monkeypatch):
    store.save("a", prefill)
    limited = replace(store, max_gb=2.5 * size_gb(store, "a"))
    really = cache_file.write

    def write(path, beginning, tensors):
        really(store.path("b"), beginning, tensors)
        really(path, beginning, tensors)

    monkeypatch.setattr(cache_file, "write", write)
    assert limited.save("c", prefill)
    assert stored(store) == ["b", "c"]


def test_one_that_is_deleted_while_it_is_read_stays_readable(store, prefill):
    store.save("abc", prefill)
    back = store.load("abc")
    store.path("abc").unlink()
    assert identical(back.prompt, prefill.prompt)
    assert store.load("abc") is None


def test_one_that_vanishes_or_is_replaced_while_it_is_opened_is_only_a_miss(store, prefill, monkeypatch):
    """Check a miss, because safetensors opens a file twice and would combine header and tensors of different files."""
    really = cache_file.safe_open
    for meanwhile in (
        lambda path: path.unlink(),
        lambda path: store.save("abc", random_prefill(["plain"], 9, statistics=frozenset())),
    ):
        store.save("abc", prefill)

        def opened(path, framework, meanwhile=meanwhile):
            handle = really(path, framework)
            meanwhile(path)
            return handle

        monkeypatch.setattr(cache_file, "safe_open", opened)
        assert store.load("abc") is None
        monkeypatch.undo()


def test_one_that_vanishes_and_is_there_again_while_it_is_opened_is_only_a_miss(store, prefill, monkeypatch):
    store.save("abc", prefill)

    def opened(path, framework):
        path.unlink()
        store.save("abc", prefill)
        raise RuntimeError(f"unable to open file <{path}> in read-only mode: No such file or directory (2)")

    monkeypatch.setattr(cache_file, "safe_open", opened)
    assert store.load("abc") is None
    monkeypatch.undo()
    assert store.load("abc") is not None


# concurrent jobs


def _job(root, number: int, max_gb: float, failures) -> None:
    """Load or save prefills in a different order for each job, as cells do."""
    store = PrefillStore(root, "always", max_gb, FACTS)
    for step in range(40):
        name = (step * (2 * number + 1)) % 7
        prefill = random_prefill(["plain", "window"], 30 + name, seed=name)
        asked = STATISTICS if (step + number) % 3 else frozenset({"attn_sum"})
        back = store.load(str(name), statistics=asked)
        if back is None or step % 5 == 0:
            store.save(str(name), without(prefill, STATISTICS - asked))
        if back is not None and not identical(back.prompt, without(prefill, STATISTICS - asked).prompt):
            failures.put(name)


def test_jobs_at_once_neither_disturb_each_other_nor_exceed_the_size(store):
    store.save("6", random_prefill(["plain", "window"], 36, seed=6))
    one = size_gb(store, "6")
    context = multiprocessing.get_context("fork")
    failures = context.Queue()
    jobs = [context.Process(target=_job, args=(store.root, number, 3 * one, failures)) for number in range(3)]
    for job in jobs:
        job.start()
    largest = 0
    while any(job.is_alive() for job in jobs):
        sizes = []
        for file in store.root.glob("*"):
            try:
                sizes.append(file.stat().st_size)
            except FileNotFoundError:
                continue
        largest = max(largest, sum(sizes))
        time.sleep(0.001)
    assert [job.exitcode for job in jobs] == [0, 0, 0]
    assert failures.empty()
    assert largest <= (3 + 3) * one * 1e9, "three files, and one more that each job is writing"
    assert not list(store.root.glob(".*")), "nothing is left half-written"
    assert sum(file.stat().st_size for file in store.root.glob("*")) <= 3 * one * 1e9
