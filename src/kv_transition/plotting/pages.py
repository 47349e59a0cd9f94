"""Parts that every HTML page of the project has: data that cannot end their element, and a policy for scripts."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from typing import Any

from markupsafe import Markup


def script_json(value: Any) -> Markup:
    """Return ``value`` as JSON in which no text can end the script element that contains it."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), sort_keys=True)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)


def security_policy(scripts: Sequence[str]) -> Markup:
    """Return the meta element that allows a page to run ``scripts`` and to draw and style itself, and nothing else.

    scripts: the whole content of each script element, which the policy identifies by its hash (Content Security Policy
    Level 3, 2.3.1). A script that a text of the results might bring in has none of these hashes; no script may turn
    text into code; the page loads nothing and sends nothing. Inline styles are allowed, because each element of a
    drawing has them.
    """
    hashes = (base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts)
    allowed = " ".join(f"'sha256-{digest}'" for digest in hashes)
    rules = (
        "default-src 'none'",
        f"script-src {allowed}",
        "style-src 'unsafe-inline'",
        "img-src data: blob:",  # figures that are saved from the page
        "base-uri 'none'",
        "form-action 'none'",
    )
    return Markup('<meta http-equiv="Content-Security-Policy" content="{}">').format(Markup("; ".join(rules)))
