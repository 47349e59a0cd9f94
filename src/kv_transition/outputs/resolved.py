"""The resolved experiment as a file: every default filled in, and what it was run with."""

from __future__ import annotations

from typing import Any

import yaml

from kv_transition.provenance import git_commit, package_versions, write_text


def write_resolved(resolved: dict[str, Any], output: str) -> None:
    """Write the configuration with the git commit and the versions of the packages that made the results."""
    provenance = {"git_commit": git_commit(), "package_versions": package_versions()}
    write_text(output, yaml.safe_dump(resolved | {"provenance": provenance}, sort_keys=False, allow_unicode=True))
