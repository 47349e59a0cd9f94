"""Report known vulnerabilities of the pinned packages: pip-audit with the advisories of PyPI or of OSV.

python tests/audit.py requirements.lock [--pip-audit PROGRAM] [--osv-url URL]

The exit status is 0 if every package was audited and none has a known vulnerability, 1 if a package has one, and 2,
with one sentence, if a package could not be audited. This happens if the index is a mirror without advisories.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("requirements", type=Path, help="file with pinned packages")
    parser.add_argument("--pip-audit", default="pip-audit", help="the program")
    parser.add_argument("--osv-url", help="address of another OSV")
    arguments = parser.parse_args(argv)
    # advisories use the public version: 2.13.0+cpu is listed as 2.13.0
    pinned = re.sub(r"(==[^\s;+]+)\+[\w.]+", r"\1", arguments.requirements.read_text(encoding="utf-8"))
    services = {"pypi": [], "osv": ["--osv-url", arguments.osv_url] if arguments.osv_url else []}
    reasons = []
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "requirements.txt")
        file.write_text(pinned, encoding="utf-8")
        for service, options in services.items():
            asked = [arguments.pip_audit, "-s", service, *options, "-r", str(file), "--no-deps", "--disable-pip"]
            packages, reason = _asked([*asked, "-f", "json", "--progress-spinner", "off"])
            if packages is not None:
                return _say(packages, service)
            reasons.append(f"{service}: {reason}")
    print(f"nothing was audited, since no advisories can be had from here ({'; '.join(reasons)})", file=sys.stderr)
    return 2


def _asked(command: list[str]) -> tuple[list[dict[str, Any]] | None, str]:
    """Return the packages that one advisory service reports on, or None and the reason why it reports none."""
    done = subprocess.run(command, capture_output=True, text=True)
    try:
        packages = json.loads(done.stdout)["dependencies"]
    except (ValueError, KeyError, TypeError):
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        return None, (lines[-1] if lines else "it said nothing")[:160]
    if not any("vulns" in package for package in packages):
        return None, f"it knows none of the {len(packages)} packages"
    return packages, ""


def _say(packages: list[dict[str, Any]], service: str) -> int:
    audited = [package for package in packages if "vulns" in package]
    weak = [package for package in audited if package["vulns"]]
    for package in weak:
        for found in package["vulns"]:
            mended = ", ".join(found.get("fix_versions") or ["no version yet"])
            print(f"{package['name']} {package['version']}: {found['id']}, mended in {mended}")
    print(f"{len(audited)} of {len(packages)} packages audited by {service}, {len(weak)} with known weaknesses")
    left = [package["name"] for package in packages if "vulns" not in package]
    if left:
        print(f"not audited, since {service} does not know them: {', '.join(left)}", file=sys.stderr)
    return 1 if weak else 2 if left else 0


if __name__ == "__main__":
    sys.exit(main())
