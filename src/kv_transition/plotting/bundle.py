"""The scripts of Vega for pages that work offline, bundled once for each version and user."""

from __future__ import annotations

import hashlib
import os
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

import vl_convert

from kv_transition.provenance import replacing


def javascript(vega_lite: str) -> str:
    """Return Vega, Vega-Lite and Vega-Embed as one script.

    Bundling takes two seconds of processor time, so the script is kept in the user's cache folder. A damaged file is
    replaced; without a folder that can be written to, the script is bundled each time.
    """
    name = f"vega-{version('vl-convert-python')}-{vega_lite}.js"
    with suppress(OSError, RuntimeError):  # no home folder, no file
        digest, _, script = (_folder() / name).read_bytes().partition(b"\n")
        if digest == _digest(script):
            return script.decode()
    script = vl_convert.javascript_bundle(vl_version=vega_lite).encode()
    with suppress(OSError, RuntimeError), replacing(_folder() / name) as temporary:
        temporary.write_bytes(_digest(script) + b"\n" + script)
    return script.decode()


def _folder() -> Path:
    """Return the folder for files that can be computed again (XDG Base Directory Specification)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kv-transition"


def _digest(script: bytes) -> bytes:
    return b"// " + hashlib.sha256(script).hexdigest().encode()
