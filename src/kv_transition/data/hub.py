"""Files of a data set on the Hugging Face hub, at one commit."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kv_transition.errors import UserError

LONGBENCH = "THUDM/LongBench"


def hub_source(dataset: Mapping[str, Any]) -> tuple[str, str] | None:
    """Return the repository and commit of a data set; None if ``dataset.path`` is local.

    Raises UserError if the revision is not a commit, or if the path is neither local nor the name of a repository.
    """
    path, revision = dataset.get("path"), dataset.get("revision")
    if path is not None:
        if Path(path).exists():
            return None
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", path) or path.startswith("."):
            raise UserError(f"dataset.path: there is no file or folder {path}")
    repository = path or LONGBENCH
    if revision is None or not re.fullmatch(r"[0-9a-f]{40}", revision):
        missing_path = f"there is no file or folder {path}, and " if path else ""
        raise UserError(
            f"dataset.revision: {missing_path}a download from the hub ({repository}) needs the commit "
            f"(40 hexadecimal digits), not {revision!r}"
        )
    return repository, revision


def list_files(repository: str, revision: str) -> list[str]:
    """Return the paths of all files in the repository at that commit."""
    import huggingface_hub

    with _Sentence(f"{repository} at {revision}"):
        return huggingface_hub.list_repo_files(repository, revision=revision, repo_type="dataset")


def fetch(repository: str, revision: str, path: str) -> Path:
    """Return the local path of one file, after downloading it if the hub's local cache lacks it."""
    import huggingface_hub

    with _Sentence(f"{path} of {repository} at {revision}"):
        return Path(huggingface_hub.hf_hub_download(repository, path, revision=revision, repo_type="dataset"))


class _Sentence:
    """A context manager that turns the errors of a download into a UserError of one sentence."""

    def __init__(self, what: str) -> None:
        self.what = what

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        import httpx

        if isinstance(error, (OSError, ValueError, httpx.HTTPError)):
            cause = str(error).strip().split("\n")[0] or type(error).__name__
            raise UserError(f"dataset: {self.what} cannot be downloaded from the hub: {cause}") from None
