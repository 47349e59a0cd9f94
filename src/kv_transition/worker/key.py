"""The key of a worker: a job is served by the worker with the same code, interpreter, environment and model."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).parents[1]

# Read when libraries are imported or a model is loaded, so the worker must have the values of the job.
_READ_AT_IMPORT = (
    "ACCELERATE_", "ALTAIR_", "ATEN_", "BNB_", "CUBLAS", "CUDA_", "CUDNN", "GLIBC_", "GOMP_", "GOTO_", "HF_",
    "KMP_", "LANG", "LC_", "LD_", "MALLOC_", "MKL", "NCCL_", "NUMBA_", "NUMEXPR_", "NVIDIA_", "OMP_",
    "OPENBLAS", "POLARS_", "PYTHON", "PYTORCH_", "RAYON_", "SAFETENSORS_", "TOKENIZERS_", "TORCH",
    "TRANSFORMERS_", "TRITON_", "TZ", "USE_", "VECLIB_", "XDG_",
)  # fmt: skip
# A worker ends with the submission that started it, so other submissions must not use it.
_SUBMISSION = ("SLURM_JOB_ID", "SLURM_STEP_GPUS", "PBS_JOBID", "LSB_JOBID", "JOB_ID", "_CONDOR_SLOT")


@dataclass(frozen=True)
class Worker:
    """What a worker holds; ``name`` is unique among the workers of this user on this machine."""

    name: str
    code: str
    model: dict[str, Any] | None
    """as `specs.prefill` has it; None: no model"""
    imports: tuple[str, ...] = ()
    """modules to import beside those that every job with a model needs"""


def code_digest() -> str:
    """Return a digest of every source file of the package, since a worker may hold modules that a job does not name."""
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
        return None  # what is wrong with it, the job says
    if model["device"] == "cpu":
        return _worker({"model": model}, model)
    # One process carries out all of its jobs where it cannot fork, so nobody's policy may meet another version of
    # itself there, and what a press changes in transformers no other job.
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
    """Return what distinguishes containers on one machine, which number their processes independently."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return None
