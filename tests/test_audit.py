"""Test the audit of the pinned packages: correct if advisories are available, one error sentence if not."""

from __future__ import annotations

import sys

import audit
import pytest

CLEAN = {"name": "one", "version": "1.0", "vulns": []}
WEAK = {"name": "two", "version": "2.0", "vulns": [{"id": "CVE-1", "fix_versions": ["2.1"]}]}
UNKNOWN = {"name": "three", "skip_reason": "Dependency not found on PyPI"}
NOWHERE = "Traceback (most recent call last):\nConnectionError: no such host"


@pytest.fixture
def audited(tmp_path, capsys):
    """Return a function that runs the audit with a fake pip-audit. Its output by service: packages, or the text of an
    error."""
    requirements = tmp_path / "requirements.lock"
    requirements.write_text("one==1.0\ntorch==2.13.0+cpu\nthree==3.0 ; python_version > '3'\n")

    def run(**said):
        program = tmp_path / "pip-audit"
        answers = {key: value if isinstance(value, str) else {"dependencies": value} for key, value in said.items()}
        program.write_text(
            f"#!{sys.executable}\n"
            "import json, sys\n"
            f"open({str(tmp_path / 'asked.txt')!r}, 'w').write(open(sys.argv[sys.argv.index('-r') + 1]).read())\n"
            f"said = {answers!r}[sys.argv[sys.argv.index('-s') + 1]]\n"
            "if isinstance(said, str):\n    sys.exit(said)\n"
            "print(json.dumps(said))\n"
        )
        program.chmod(0o755)
        status = audit.main([str(requirements), "--pip-audit", str(program)])
        out, err = capsys.readouterr()
        return status, out, err

    yield run
    assert (tmp_path / "asked.txt").read_text() == "one==1.0\ntorch==2.13.0\nthree==3.0 ; python_version > '3'\n"


def test_the_index_has_advisories(audited):
    assert audited(pypi=[CLEAN]) == (0, "1 of 1 packages audited by pypi, 0 with known weaknesses\n", "")
    status, out, _ = audited(pypi=[CLEAN, WEAK])
    assert status == 1
    assert "two 2.0: CVE-1, mended in 2.1" in out


def test_a_mirror_without_advisories_is_not_taken_for_a_clean_bill(audited):
    """Check the case in which pip-audit itself prints "No known vulnerabilities found" with status 0."""
    status, out, _ = audited(pypi=[UNKNOWN, UNKNOWN], osv=[CLEAN, WEAK])
    assert status == 1
    assert "audited by osv" in out


def test_no_service_is_one_sentence(audited):
    status, out, err = audited(pypi=[UNKNOWN], osv=NOWHERE)
    assert (status, out) == (2, "")
    assert err.count("\n") == 1
    assert err.startswith("nothing was audited")
    assert "knows none of the 1 packages" in err
    assert "no such host" in err


def test_a_package_that_is_not_known_is_named(audited):
    status, _, err = audited(pypi=[CLEAN, UNKNOWN])
    assert status == 2
    assert "three" in err
