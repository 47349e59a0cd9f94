"""The key of a worker: a job is served by the worker with the same code, interpreter, environment and model."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

PACKAGE = Path(__file__).parents[1]

# Prefixes of variables that are read when libraries are imported or a model is loaded; worker and job must agree.
_READ_AT_IMPORT = (
    "ACCELERATE_", "ALTAIR_", "ATEN_", "BNB_", "CUBLAS", "CUDA_", "CUDNN", "GLIBC_", "GOMP_", "GOTO_", "HF_",
    "KMP_", "LANG", "LC_", "LD_", "MALLOC_", "MKL", "NCCL_", "NUMBA_", "NUMEXPR_", "NVIDIA_", "OMP_",
    "OPENBLAS", "POLARS_", "PYTHON", "PYTORCH_", "RAYON_", "SAFETENSORS_", "TOKENIZERS_", "TORCH",
    "TRANSFORMERS_", "TRITON_", "TZ", "USE_", "VECLIB_", "XDG_",
)  # fmt: skip
# A worker ends with the submission that started it, so other submissions must not use it.
_SUBMISSION = ("SLURM_JOB_ID", "SLURM_STEP_GPUS", "PBS_JOBID", "LSB_JOBID", "JOB_ID", "_CONDOR_SLOT")


class Worker(NamedTuple):
    """The content of a worker; ``name`` is unique among the workers of this user on this machine."""

    name: str
    code: str
    model: dict[str, Any] | None
    """the spec of the model, as in `specs.prefill`; None: no model"""
    imports: tuple[str, ...] = ()
    """modules to import, in addition to those that every job with a model needs"""


def code_digest() -> str:
    """Return a digest of every source file of the package, because a worker may have imported modules that no job
    names.
    """
    files = sorted(path for path in PACKAGE.rglob("*.py"))
    found = hashlib.sha256(str(PACKAGE).encode())
    for file in files:
        found.update(str(file.relative_to(PACKAGE)).encode() + b"\0" + file.read_bytes())
    return found.hexdigest()[:32]


def of_arguments(module: str, arguments: Sequence[str]) -> Worker | None:
    """Return the worker for a job by its command line; None for a job whose ``--spec`` names no model."""
    try:
        spec = json.loads(arguments[list(arguments).index("--spec") + 1])
        model = spec["model"]
        if not {"name", "dtype", "device", "fingerprint"} <= set(model):
            return None
    except (ValueError, IndexError, KeyError, TypeError):
        return None  # the job itself reports what is wrong with its arguments
    if model["device"] == "cpu":
        return _worker({"model": model}, model)
    # On a GPU one process runs all jobs. Therefore two versions of a policy must not share a worker, and the changes
    # that a press makes to transformers must not affect other jobs.
    kind = str(spec.get("kind", ""))
    alone = {"content": spec.get("policy_content"), "press": kind.startswith("kvpress.")}
    return _worker({"model": model} | alone, model)


def of_imports(imports: Sequence[str]) -> Worker:
    """Return the worker that holds no model and has these modules imported, in any order."""
    return _worker({"imports": sorted(imports)}, None, tuple(imports))


def _worker(what: Mapping[str, Any], model: dict[str, Any] | None, imports: tuple[str, ...] = ()) -> Worker:
    code = code_digest()
    identity = {
        **what,
        "code": code,
        "python": [sys.executable, sys.version, sys.path],
        "environment": sorted(pair for pair in os.environ.items() if pair[0].startswith(_READ_AT_IMPORT)),
        "submission": [os.environ.get(name) for name in _SUBMISSION],
        "processes": _namespace(),
    }
    text = json.dumps(identity, sort_keys=True)
    return Worker(hashlib.sha256(text.encode()).hexdigest()[:16], code, model, imports)


def _namespace() -> str | None:
    """Return the identity of the process namespace, because containers on one machine number their processes
    independently.
    """
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return None
