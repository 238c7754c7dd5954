"""The script that draws the charts is made once, kept, and made anew when what was kept cannot be had."""

from __future__ import annotations

from pathlib import Path

import pytest

from fallline.reports import vega


@pytest.fixture
def cache(tmp_path: Path, monkeypatch) -> Path:
    path = tmp_path / "cache" / "vega.js"
    monkeypatch.setattr(vega, "cache_file", lambda: path)
    monkeypatch.setattr(vega, "BUNDLE", "print('made', end='')")
    return path


def test_it_is_made_once_and_kept(cache: Path, monkeypatch) -> None:
    with vega.bundling() as bundled:
        assert bundled() == "made"
    assert cache.read_text() == "made"
    monkeypatch.setattr(vega, "BUNDLE", "raise SystemExit(1)")
    with vega.bundling() as bundled:
        assert bundled() == "made"
    assert list(cache.parent.iterdir()) == [cache]


def test_a_process_that_fails_is_made_up_for(cache: Path, monkeypatch) -> None:
    monkeypatch.setattr(vega, "BUNDLE", "raise SystemExit(1)")
    monkeypatch.setattr(vega, "_bundle", lambda: "made here")
    with vega.bundling() as bundled:
        assert bundled() == "made here"
    monkeypatch.setattr(vega.sys, "executable", "/nowhere/python")
    cache.unlink()
    with vega.bundling() as bundled:
        assert bundled() == "made here"


def test_a_folder_that_cannot_be_written_does_no_harm(cache: Path) -> None:
    cache.parent.write_text("a file where the folder should be")
    with vega.bundling() as bundled:
        assert bundled() == "made"


def test_whoever_fails_before_taking_the_script_leaves_no_process(cache: Path, monkeypatch) -> None:
    monkeypatch.setattr(vega, "BUNDLE", "import time; time.sleep(60)")
    with pytest.raises(RuntimeError, match="on the way"), vega.bundling():
        raise RuntimeError("on the way")
