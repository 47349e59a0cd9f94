"""Checks of this machine for an experiment: one line each, with advice."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from kv_transition import preflight
from kv_transition.cache import disk
from kv_transition.data import gguf, model_files
from kv_transition.data.model_files import cached_file
from kv_transition.errors import UserError
from kv_transition.plan import table, work
from kv_transition.plan.model_size import ModelSize, model_size
from kv_transition.settings import Settings

State = Literal["ok", "warn", "fail"]
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")
TIMEOUT_S = 5.0


@dataclass(frozen=True)
class Finding:
    """The result of one check. fail: the experiment cannot run; warn: it can run, but slower or later."""

    what: str
    state: State
    found: str
    fix: str = ""


def examine(settings: Settings) -> Iterator[Finding]:
    """Yield the result of every check, from the machine to the experiment."""
    size = model_size(settings.model)
    remote = settings.engine.kind == "openai"
    yield _python()
    if remote:
        yield from _endpoint(settings)
    else:
        yield from _torch(settings, size)
        yield _memory(settings, size)
        yield from _extensions(settings)
        yield _model(settings)
    yield _tokenizer(settings)
    yield from _data(settings)
    yield _conda()
    yield _slurm()
    yield _disk(settings, size)


def screen(settings: Settings, findings: list[Finding], console: Console) -> None:
    colours = {"ok": "green", "warn": "yellow", "fail": "red"}
    shown = Table(title=f"experiment {settings.experiment}", title_justify="left", box=None, padding=(0, 1))
    for head in ("", "", "found", "what to do"):
        shown.add_column(head, overflow="fold")
    for finding in findings:
        state = f"[{colours[finding.state]}]{finding.state}[/]"
        shown.add_row(state, finding.what, escape(finding.found), escape(finding.fix))
    console.print(shown)


def _python() -> Finding:
    version = ".".join(map(str, sys.version_info[:3]))
    return Finding("Python", "ok", f"{version}, {len(os.sched_getaffinity(0))} cores")


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _torch(settings: Settings, size: ModelSize | None) -> Iterator[Finding]:
    if _version("torch") is None:
        yield Finding("torch", "fail", "not installed", "make, or pip install -r requirements.lock")
        return
    import torch

    cuda = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU only"
    yield Finding("torch", "ok", f"{torch.__version__}, {cuda}")
    device = settings.model.device
    if not torch.cuda.is_available():
        here = "torch finds none"
        if device == "cuda":
            yield Finding(
                "GPU", "fail", here, "set model.device to cpu, or run on a machine with a GPU (docs/cluster.md)"
            )
        elif device == "auto":
            yield Finding("GPU", "warn", here, "cells run on the CPU; with model.device: cpu they run in parallel")
        else:
            yield Finding("GPU", "ok", f"{here}; model.device is cpu")
        return
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    total = torch.cuda.mem_get_info(0)[1]
    found = f"{', '.join(names)}; {table.size(total)}"
    if device == "cpu":
        yield Finding("GPU", "warn", found, "model.device is cpu, so the GPU is not used; set it to cuda")
    elif size is None:
        yield Finding("GPU", "ok", found)
    else:
        yield _fits("GPU", found, total if settings.model.device_map is None else total * len(names), settings, size)


def _fits(what: str, found: str, room: int, settings: Settings, size: ModelSize) -> Finding:
    """Return whether the weights and one full cache of the longest prompt fit into ``room`` bytes.

    A tenth is reserved for activations and copies.
    """
    weights = size.weight_bytes(settings.model)
    cache = size.cache_bytes(settings.model.max_length, settings.model.dtype)
    need = f"weights {table.size(weights)}, longest cache {table.size(cache)}"
    if weights > room:
        fix = "use a smaller model, model.quantization: {}, or model.device_map: auto on several GPUs"
        return Finding(what, "fail", f"{found}; {need}", fix)
    if weights + cache > 0.9 * room:
        return Finding(what, "warn", f"{found}; {need}", "lower model.max_length or set prefill.chunk_tokens")
    return Finding(what, "ok", f"{found}; {need}")


def _memory(settings: Settings, size: ModelSize | None) -> Finding:
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    found = table.size(total)
    if size is None or settings.model.device == "cuda":
        return Finding("memory", "ok", found)
    return _fits("memory", found, total, settings, size)


# Optional packages: which experiments need one, and how to install it.
def _extensions(settings: Settings) -> Iterator[Finding]:
    model = settings.model
    flash = "use envs/inference.yaml (snakemake --sdm conda), or model.attn_implementation: sdpa"
    yield _extension("flash-attn", "flash_attn", model.attn_implementation == "flash_attention_2", flash)
    triton = "pip install '.[kernels]', or model.attention_statistics: blocks"
    yield _extension("triton", "triton", model.attention_statistics == "triton", triton)
    extra = "pip install '.[quantization]'"
    yield _extension("bitsandbytes", "bitsandbytes", model.quantization is not None, extra)
    yield _extension("accelerate", "accelerate", bool(model.device_map or model.quantization), extra)
    if any(str((o or {}).get("kind", name)).startswith("kvpress.") for name, o in settings.kv.policies.items()):
        yield _extension("kvpress", "kvpress", True, "pip install kvpress, or remove its presses")


def _extension(package: str, module: str, needed: bool, fix: str) -> Finding:
    if importlib.util.find_spec(module):
        return Finding(package, "ok", _version(package) or "installed")
    if needed:
        return Finding(package, "fail", "not installed, but the experiment needs it", fix)
    return Finding(package, "ok", "not installed, not needed")


def _model(settings: Settings) -> Finding:
    name, revision = settings.model.name, settings.model.revision
    if gguf.is_gguf(name):
        return _gguf(name)
    local = Path(name).expanduser().is_dir()
    try:
        model_files.check(name, revision)
    except UserError as error:
        return Finding("model", "fail", str(error), "download the model again")
    if any(cached_file(name, revision, file) for file in WEIGHTS):
        if too_long := preflight.too_long(settings):
            return Finding("model", "warn", too_long, "lower model.max_length, or choose another model")
        return Finding("model", "ok", f"{name}, {'a folder' if local else 'in the hub cache'}")
    if local:
        return Finding("model", "fail", f"{name} contains no weights", f"add one of {', '.join(WEIGHTS)}")
    return _hub("model", name, revision, "models")


def _gguf(name: str) -> Finding:
    try:
        return Finding("model", "ok", f"{name}, {gguf.quantization(name)}")
    except UserError as error:
        known = "make real" in str(error)
        return Finding("model", "fail", str(error), "" if known else "make real installs a model that works")


def _tokenizer(settings: Settings) -> Finding:
    name, revision = settings.model.name, settings.model.revision
    if gguf.is_gguf(name):
        return Finding("tokenizer", "ok", "in the GGUF file")
    folder = Path(name).expanduser()
    if folder.is_dir():
        if any((place / file).is_file() for place in (folder, folder / "tokenizer") for file in TOKENIZERS):
            return Finding("tokenizer", "ok", "there")
        return Finding("tokenizer", "fail", f"none in {name}", "add its tokenizer.json")
    if any(cached_file(name, revision, file) for file in TOKENIZERS):
        return Finding("tokenizer", "ok", "in the hub cache")
    return _hub("tokenizer", name, revision, "models")


def _hub(what: str, repository: str, revision: str | None, kind: str) -> Finding:
    """Return whether the hub has the repository; this takes one small request."""
    import httpx

    without = "; make real installs a language model without the hub" if what == "model" else ""

    if os.environ.get("HF_HUB_OFFLINE") in ("1", "true", "TRUE", "yes"):
        return Finding(
            what, "fail", f"{repository} is not local, and HF_HUB_OFFLINE is set", f"download it first{without}"
        )
    base = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    token = os.environ.get("HF_TOKEN")
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    url = f"{base}/api/{kind}/{repository}" + (f"/revision/{revision}" if revision else "")
    try:
        status = httpx.get(url, headers=headers, timeout=TIMEOUT_S, follow_redirects=True).status_code
    except httpx.HTTPError as error:
        fix = "download it on a machine with a network and give its folder, or set HF_ENDPOINT to a mirror"
        fix += without
        return Finding(what, "fail", f"{repository} is not local, and the hub cannot be reached ({_kind(error)})", fix)
    if status == 200:
        return Finding(what, "warn", f"{repository} is on the hub", "the first job that needs it downloads it")
    if status in (401, 403):
        return Finding(
            what, "fail", f"the hub refuses access to {repository}", "accept its terms there and set HF_TOKEN"
        )
    return Finding(what, "fail", f"the hub has no {repository} (status {status})", "check its name and revision")


def _kind(error: Exception) -> str:
    return type(error).__name__


def _endpoint(settings: Settings) -> Iterator[Finding]:
    """Yield whether the endpoint answers and accepts the key. The key is never printed."""
    import httpx

    engine = settings.engine
    key = os.environ.get(engine.api_key_env) if engine.api_key_env else None
    if engine.api_key_env:
        missing = "set it (see .env.example), unless your own server needs no key"
        found = f"{engine.api_key_env} is {'set' if key else 'not set'}"
        yield Finding("key", "ok" if key else "warn", found, "" if key else missing)
    addresses = dict.fromkeys([engine.base_url, *(e.base_url for e in engine.endpoints.values() if e.base_url)])
    for url in addresses:
        try:
            headers = {"Authorization": f"Bearer {key}"} if key else {}
            status = httpx.get(f"{url.rstrip('/')}/models", headers=headers, timeout=TIMEOUT_S).status_code
        except httpx.HTTPError as error:
            fix = "start the server, or check engine.base_url"
            yield Finding("endpoint", "fail", f"{url} cannot be reached ({_kind(error)})", fix)
            continue
        if status in (401, 403):
            yield Finding("endpoint", "fail", f"{url} refuses the key", f"check the variable {engine.api_key_env}")
        elif status >= 400:
            yield Finding("endpoint", "warn", f"{url} answers, but lists no models (status {status})")
        else:
            yield Finding("endpoint", "ok", url)


def _data(settings: Settings) -> Iterator[Finding]:
    if dataset := settings.dataset:
        yield _dataset(dataset, settings)
    if section := settings.perplexity:
        yield _source("perplexity", section.path, section.revision, section.corpus == "synthetic")
    if section := settings.chat:
        yield _source("conversations", section.path, None, section.source == "generated")


def _dataset(dataset, settings: Settings) -> Finding:
    if dataset.name in ("synthetic", "ruler"):
        return Finding("data set", "ok", f"{dataset.name}: generated")
    from kv_transition.paths import Paths

    files = Paths(settings.output.dir, settings.experiment)
    if all(Path(files.source(task)).is_file() for task in dataset.tasks):
        return Finding("data set", "ok", f"{dataset.name}: already downloaded")
    path = dataset.path
    if path and Path(path).exists():
        return Finding("data set", "ok", f"{dataset.name}: {path}")
    from kv_transition.data.hub import hub_source

    try:
        source = hub_source(dataset.model_dump())
    except UserError as error:
        return Finding("data set", "fail", dataset.name, str(error))
    if source is None:
        return Finding("data set", "ok", dataset.name)
    return _hub("data set", *source, "datasets")


def _source(what: str, path: str | None, revision: str | None, generated: bool) -> Finding:
    if generated:
        return Finding(what, "ok", "generated")
    if path and Path(path).exists():
        return Finding(what, "ok", path)
    return _hub(what, path or "", revision, "datasets")


def _conda() -> Finding:
    if shutil.which("conda"):
        return Finding("conda", "ok", "installed; --sdm conda creates an environment for each phase")
    return Finding("conda", "ok", "not installed: jobs run in this environment, and --sdm conda is unavailable")


def _slurm() -> Finding:
    if not shutil.which("sbatch"):
        return Finding("Slurm", "ok", "not installed: jobs run on this machine, and profiles/slurm is unavailable")
    if importlib.util.find_spec("snakemake_executor_plugin_slurm") is None:
        return Finding("Slurm", "warn", "installed, but Snakemake's plugin is not", "pip install '.[cluster]'")
    done = subprocess.run(["sinfo", "--noheader", "--format", "%P %G"], capture_output=True, text=True, timeout=30)
    if done.returncode:
        return Finding("Slurm", "warn", "sbatch is installed, but no cluster answers", "run it on a login node")
    return Finding("Slurm", "ok", "; ".join(done.stdout.split("\n")[:4]).strip("; "))


def _disk(settings: Settings, size: ModelSize | None) -> Finding:
    made = work.work(settings)
    answers = sum(item.bytes(item.left) for item in made.items)
    on = disk.usage(settings.output.dir)
    free = on.free
    store = 0 if size is None or settings.prefill.store == "never" else made.store_bytes(size)
    store = min(store, int(settings.prefill.max_gb * 1e9))
    found = f"{table.size(free)} free; answers {table.size(answers)}, prefills up to {table.size(store)}"
    folder = Path(settings.output.dir)
    writable = next(f for f in (folder.absolute(), *folder.absolute().parents) if f.exists())
    if not os.access(writable, os.W_OK):
        return Finding("disk", "fail", f"{writable} cannot be written to", "give another output.dir")
    if answers > free:
        return Finding("disk", "fail", found, "free disk space, or give another output.dir")
    spare = disk.spare_bytes(on.total) if store and settings.prefill.store == "auto" else 0
    if answers + store > min(0.9 * free, free - spare):
        advice = "free disk space, or lower prefill.max_gb; prefills that are not stored are computed again"
        return Finding("disk", "warn", found, advice)
    return Finding("disk", "ok", found)
