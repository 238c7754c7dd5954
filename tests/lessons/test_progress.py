"""A learner's progress: kept as a whole or not at all, kept aside when it cannot be read, and kept within bounds."""

from __future__ import annotations

import errno
import json
import os
import signal
import stat
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fallline.errors import InvalidCourse
from fallline.lessons import progress
from fallline.lessons.progress import LARGEST_FILE, Progress, file_of

DONE = {"answers": {"purpose": 1, "adaptive": 0}, "guesses": {"see-it-move-1": "diverges"}, "code": {"a": "x = 1\n"}}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "learn" / "ann.json"


# What is kept.


def test_what_was_done_is_there_again(path: Path):
    Progress(path).change("which-loss", {**DONE, "place": "check-yourself"})
    again = Progress(path)
    assert again.page("which-loss") == {**DONE, "place": "check-yourself"}
    assert again.page("a-fair-race") == {}
    assert again.complaint == ""


def test_a_learner_without_a_file_has_done_nothing_and_leaves_none(path: Path):
    new = Progress(path)
    assert (new.pages, new.complaint) == ({}, "")
    assert not path.exists()


def test_changes_are_merged_entry_by_entry(path: Path):
    kept = Progress(path)
    kept.change("which-loss", {"answers": {"a": 1, "b": 2}, "place": "one"})
    kept.change("which-loss", {"answers": {"b": 0, "c": 3}, "code": {"cell": "y"}})
    kept.change("a-fair-race", {"answers": {"a": 9}})
    for found in (kept, Progress(path)):
        assert found.pages == {
            "which-loss": {"answers": {"a": 1, "b": 0, "c": 3}, "place": "one", "code": {"cell": "y"}},
            "a-fair-race": {"answers": {"a": 9}},
        }


@pytest.mark.parametrize("kind", ["answers", "guesses", "code"])
def test_none_forgets_an_entry_and_no_other(path: Path, kind: str):
    kept = Progress(path)
    kept.change("which-loss", {kind: {"a": 1, "b": "2"}})
    kept.change("which-loss", {kind: {"a": None, "never": None}})
    for found in (kept, Progress(path)):
        assert found.page("which-loss") == {kind: {"b": "2"}}


def test_the_place_is_the_last_one(path: Path):
    kept = Progress(path)
    for place in ("one", "", "two"):
        kept.change("which-loss", {"place": place})
        assert Progress(path).page("which-loss") == {"place": place}


def test_one_page_is_forgotten_or_all(path: Path):
    kept = Progress(path)
    for name in ("which-loss", "a-fair-race"):
        kept.change(name, DONE)
    kept.reset("which-loss")
    assert Progress(path).pages == kept.pages == {"a-fair-race": DONE}
    kept.reset("no-such-page")
    assert Progress(path).pages == {"a-fair-race": DONE}
    kept.reset()
    assert Progress(path).pages == kept.pages == {}


def test_what_is_exported_is_the_file(path: Path):
    kept = Progress(path)
    kept.change("which-loss", {"code": {"a": "print('größer als 0 · 损失')"}})
    assert path.read_text(encoding="utf-8") == kept.text()
    assert json.loads(kept.text()) == {"version": progress.VERSION, "pages": kept.pages}
    assert "größer als 0 · 损失" in kept.text()


@pytest.mark.skipif(sys.platform == "win32", reason="modes are of POSIX")
def test_only_the_learner_may_read_it(path: Path):
    Progress(path).change("which-loss", DONE)
    assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0
    assert stat.S_IMODE(path.parent.stat().st_mode) & 0o077 == 0
    assert [each.name for each in path.parent.iterdir()] == ["ann.json"]


# Written as a whole or not at all.


@contextmanager
def full_disk() -> Iterator[None]:
    """A disk on which nothing longer than 100 bytes can be written."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    heard = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, heard)


@contextmanager
def no_replacing() -> Iterator[None]:
    """A disk on which no file can take the place of another."""

    def full(*arguments: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.MonkeyPatch.context() as patch:
        for name in ("replace", "rename"):
            patch.setattr(os, name, full)
        yield


@pytest.mark.parametrize("trouble", [full_disk, no_replacing])
def test_a_disk_that_is_full_leaves_the_old_file_whole_and_nothing_beside_it(path: Path, trouble: Any):
    kept = Progress(path)
    kept.change("which-loss", DONE)
    before = path.read_bytes()
    with trouble():
        kept.change("which-loss", {"code": {"a": "x" * 100}})
    assert path.read_bytes() == before
    assert kept.complaint.startswith(f"Your progress cannot be saved in {path}: ")
    assert kept.complaint.endswith(".")
    assert kept.page("which-loss")["code"] == {"a": "x" * 100}, "learning goes on"
    assert [each.name for each in path.parent.iterdir()] == ["ann.json"], "a part of a file was left behind"


def test_once_there_is_room_again_everything_is_saved_and_nobody_complains(path: Path):
    kept = Progress(path)
    with no_replacing():
        kept.change("which-loss", {"answers": {"a": 1}})
    assert os.strerror(errno.ENOSPC) in kept.complaint
    kept.change("which-loss", {"answers": {"b": 2}})
    assert kept.complaint == ""
    assert Progress(path).page("which-loss") == {"answers": {"a": 1, "b": 2}}


def test_a_folder_that_cannot_be_made_is_complained_of_and_learning_goes_on(tmp_path: Path):
    (tmp_path / "learn").write_text("a file in the way")
    kept = Progress(tmp_path / "learn" / "ann.json")
    kept.change("which-loss", DONE)
    assert "cannot be saved" in kept.complaint
    assert kept.page("which-loss") == DONE


# What cannot be read.

UNREADABLE = {
    "nothing": b"",
    "half": b'{"version": 1, "pages": {',
    "no text": b"\xff\xfe\x00\x01",
    "no object": b"[]",
    "null": b"null",
    "a text": b'"pages"',
    "a number": b"1",
    "no version": b'{"pages": {}}',
    "another version": b'{"version": 2, "pages": {}}',
    "no pages": b'{"version": 1}',
    "pages that are a list": b'{"version": 1, "pages": []}',
    "a page that is a list": b'{"version": 1, "pages": {"which-loss": []}}',
    "a page with more": b'{"version": 1, "pages": {"which-loss": {"score": {}}}}',
    "answers that are a list": b'{"version": 1, "pages": {"which-loss": {"answers": [1]}}}',
    "an answer that is a list": b'{"version": 1, "pages": {"which-loss": {"answers": {"a": [1]}}}}',
    "an answer that is no number": b'{"version": 1, "pages": {"which-loss": {"answers": {"a": NaN}}}}',
    "a place that is a number": b'{"version": 1, "pages": {"which-loss": {"place": 3}}}',
    "an endless number": b'{"version": 1, "pages": {"which-loss": {"answers": {"a": ' + b"9" * 5000 + b"}}}}",
    "lists in lists": b"[" * 100_000,
    "objects in objects": b'{"version": 1, "pages": ' + b'{"a":' * 100_000,
}


@pytest.mark.parametrize("content", UNREADABLE.values(), ids=UNREADABLE)
def test_a_file_that_cannot_be_read_is_kept_aside_and_learning_goes_on(path: Path, content: bytes):
    path.parent.mkdir()
    path.write_bytes(content)
    kept = Progress(path)
    assert kept.pages == {}
    (aside,) = path.parent.iterdir()
    assert aside != path
    assert aside.read_bytes() == content
    assert kept.complaint.startswith("Your progress could not be read (")
    assert str(aside) in kept.complaint
    kept.change("which-loss", DONE)
    assert Progress(path).page("which-loss") == DONE
    assert Progress(path).complaint == ""
    assert aside.read_bytes() == content


def test_a_second_unreadable_file_does_not_take_the_place_of_the_first(path: Path):
    path.parent.mkdir()
    contents = {b"{", b"["}
    for content in contents:
        path.write_bytes(content)
        Progress(path)
    assert {each.read_bytes() for each in path.parent.iterdir()} == contents


def test_what_is_kept_aside_takes_the_place_of_no_other_learner(tmp_path: Path):
    path = file_of("ann", tmp_path)
    path.write_bytes(b"{")
    Progress(path)
    (aside,) = tmp_path.iterdir()
    with suppress(InvalidCourse):  # nobody can be called so
        assert file_of(aside.name.removesuffix(".json"), tmp_path) != aside


# What is refused.


def test_too_much_is_refused_and_nothing_changes(path: Path):
    kept = Progress(path)
    kept.change("which-loss", DONE)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="4 MiB"):
        kept.change("which-loss", {"code": {"a": "x" * LARGEST_FILE}})
    assert kept.pages == {"which-loss": DONE}
    assert path.read_bytes() == before
    kept.change("which-loss", {"place": "on"})
    assert Progress(path).page("which-loss") == {**DONE, "place": "on"}


def test_what_counts_is_the_size_of_the_file(path: Path):
    kept = Progress(path)
    with pytest.raises(ValueError, match="4 MiB"):
        kept.change("which-loss", {"code": {"a": "损" * (LARGEST_FILE // 2)}})
    kept.change("which-loss", {"code": {"a": "x" * (LARGEST_FILE - 1000)}})
    assert path.stat().st_size <= LARGEST_FILE
    assert Progress(path).complaint == ""


@pytest.mark.parametrize(
    "wrong",
    [
        None,
        [],
        "answers",
        {"score": {}},
        {"answers": []},
        {"answers": None},
        {"answers": {"a": 0.5}},
        {"answers": {"a": []}},
        {"answers": {"a": {}}},
        {"answers": {"a" * 201: 1}},
        {"answers": {1: 1}},
        {"place": None},
        {"place": 1},
        {"place": "a" * 201},
    ],
)
def test_what_is_no_progress_is_refused_and_nothing_changes(path: Path, wrong: Any):
    kept = Progress(path)
    kept.change("which-loss", DONE)
    with pytest.raises(ValueError, match=r"\w"):
        kept.change("which-loss", wrong)
    assert kept.pages == Progress(path).pages == {"which-loss": DONE}
    kept.change("a-fair-race", DONE)
    assert Progress(path).pages == {"which-loss": DONE, "a-fair-race": DONE}


def test_half_a_letter_spoils_nothing_that_comes_after_it(path: Path):
    """JSON may hold the half of a letter that takes two units of UTF-16; a file in UTF-8 may not."""
    kept = Progress(path)
    with suppress(ValueError):
        kept.change("which-loss", json.loads('{"code": {"a": "\\ud800"}}'))
    kept.change("a-fair-race", DONE)
    assert kept.complaint == ""
    assert Progress(path).pages == kept.pages
    assert kept.page("a-fair-race") == DONE


def test_half_a_letter_in_the_file_spoils_nothing_that_comes_after_it(path: Path):
    path.parent.mkdir()
    path.write_bytes(b'{"version": 1, "pages": {"which-loss": {"code": {"a": "\\ud800"}}}}')
    kept = Progress(path)
    kept.change("a-fair-race", DONE)
    assert Progress(path).pages == kept.pages
    assert kept.page("a-fair-race") == DONE


LETTERS = st.text(max_size=20) | st.sampled_from(["half of a letter: \ud800", "\udfff"])
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | LETTERS
JSON = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(LETTERS, inner, max_size=3))
NEARLY = st.fixed_dictionaries(
    {},
    optional={
        "answers": st.dictionaries(LETTERS, SCALARS, max_size=3),
        "code": st.dictionaries(LETTERS, LETTERS | st.none(), max_size=3),
        "guesses": JSON,
        "place": LETTERS | JSON,
    },
)


@given(st.lists(JSON | NEARLY, max_size=4))
def test_whatever_is_given_is_either_refused_or_there_again(given_ones: list[Any]):
    with tempfile.TemporaryDirectory() as folder:
        kept = Progress(Path(folder) / "ann.json")
        kept.change("which-loss", DONE)
        for given_one in given_ones:
            before = kept.text()
            try:
                kept.change("which-loss", given_one)
            except ValueError:
                assert kept.text() == before
            assert kept.complaint == ""
            again = Progress(kept.path)
            assert (again.pages, again.text(), again.complaint) == (kept.pages, kept.text(), "")


# Whose it is.


@pytest.mark.parametrize("name", ["ann", "Zoë", "ann.b-c_d@e", "j.doe", "...a", "-rf", "损失", "a" * 64])
def test_a_learner_has_a_file_of_their_own(tmp_path: Path, name: str):
    path = file_of(name, tmp_path)
    assert path == tmp_path / f"{name}.json"
    Progress(path).change("which-loss", DONE)
    assert Progress(path).pages == {"which-loss": DONE}


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        "...",
        "../x",
        "a/b",
        "/etc/passwd",
        "..\\x",
        "a\\b",
        "C:x",
        "~",
        "a b",
        "a\n",
        "a\0",
        "a" * 65,
        "𝔘" * 64,  # of 4 bytes each: longer than a file's name may be
    ],
    ids=lambda name: ascii(name[:9]),
)
def test_a_name_that_cannot_be_a_files_is_refused(tmp_path: Path, name: str):
    with pytest.raises(InvalidCourse, match=r"--learner .* cannot name a file"):
        file_of(name, tmp_path)


@given(st.text() | st.from_regex(r"[\w./@-]{1,8}", fullmatch=True))
def test_no_name_leaves_the_folder(name: str):
    folder = Path("/somewhere/learn")
    try:
        path = file_of(name, folder)
    except InvalidCourse:
        return
    assert path.parent == folder
    assert os.path.normpath(path) == str(path)
    assert path.name == f"{name}.json"


def test_files_lie_with_the_data_of_this_machines_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(progress, "user_data_path", lambda name: tmp_path / name)
    assert file_of("ann") == tmp_path / "fallline" / "learn" / "ann.json"
