"""The resolved experiment as a file: every default filled in, with commit and package versions."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import yaml

from kv_transition.data import gguf
from kv_transition.errors import UserError
from kv_transition.provenance import git_commit, package_versions, write_text


def write_resolved(resolved: dict[str, Any], output: str) -> None:
    """Write the configuration with the git commit and the package versions that the results were computed with.

    For a GGUF model, also write its number of parameters and the origin of its weights (`gguf.origin`).
    """
    provenance: dict[str, Any] = {"git_commit": git_commit(), "package_versions": package_versions()}
    name = resolved["model"]["name"]
    # an environment for the analysis alone may lack the package that reads the file
    with suppress(UserError):
        if gguf.is_gguf(name):
            provenance |= {"weights_from": gguf.origin(name), "parameters": gguf.header(name)["parameters"]}
    write_text(output, yaml.safe_dump(resolved | {"provenance": provenance}, sort_keys=False, allow_unicode=True))
