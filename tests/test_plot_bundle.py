"""Check that Vega's scripts are bundled once, and that a damaged or missing cache changes no page."""

import pytest
import vl_convert

from kv_transition.plotting import bundle

VERSION = "6.1"


@pytest.fixture
def bundled(monkeypatch):
    """Replace the bundler; return the list of its calls."""
    calls = []

    def javascript_bundle(vl_version):
        calls.append(vl_version)
        return "let line = '\r\n\u2028ü';"

    monkeypatch.setattr(vl_convert, "javascript_bundle", javascript_bundle)
    return calls


def test_the_scripts_are_bundled_once_and_kept_as_they_are(bundled, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert bundle.javascript(VERSION) == bundle.javascript(VERSION) == "let line = '\r\n\u2028ü';"
    assert bundled == [VERSION]


def test_another_version_has_scripts_of_its_own(bundled, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    bundle.javascript(VERSION)
    bundle.javascript("5.8")
    assert bundled == [VERSION, "5.8"]


@pytest.mark.parametrize(
    "damage", [lambda b: b[:-3], lambda b: b"", lambda b: b.replace(b"let", b"bad"), lambda b: b"\xff"]
)
def test_a_damaged_file_is_replaced(bundled, tmp_path, monkeypatch, damage):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    right = bundle.javascript(VERSION)
    (file,) = (tmp_path / "kv-transition").iterdir()
    whole = file.read_bytes()
    file.write_bytes(damage(whole))
    assert bundle.javascript(VERSION) == right
    assert file.read_bytes() == whole


def test_without_a_folder_the_scripts_are_bundled_each_time(bundled, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert bundle.javascript(VERSION) == bundle.javascript(VERSION)
    assert bundled == [VERSION, VERSION]
