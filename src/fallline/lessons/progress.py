"""What a learner has done: answers, guesses, edited code, the place reached; in one file of this machine's user."""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from platformdirs import user_data_path

from fallline.errors import InvalidCourse

VERSION = 1
LARGEST_FILE = 4 * 1024 * 1024
LONGEST_NAME = 200  # in bytes; what a file is called may have 255
NAME = re.compile(r"[\w.@-]{1,64}")


def file_of(learner: str, folder: Path | None = None) -> Path:
    """Where the progress of a learner lies.

    Args:
        learner: a name of letters, digits and `_.@-`.
        folder: instead of the folder for the data of this machine's user.

    Raises:
        InvalidCourse: for a name that cannot be a file's.
    """
    if not NAME.fullmatch(learner) or not learner.strip(".") or len(learner.encode()) > LONGEST_NAME:
        raise InvalidCourse(f"--learner {learner!r} cannot name a file: use letters, digits, and any of _ . @ -")
    return (folder or user_data_path("fallline") / "learn") / f"{learner}.json"


class Progress:
    """The progress of one learner, read once and written after every change, as a whole or not at all.

    Args:
        path: of its file. A file that cannot be read is kept beside it, and the learner starts anew.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.complaint = ""
        self.pages: dict[str, dict[str, Any]] = {}
        if path.exists():
            try:
                self.pages = _checked(json.loads(path.read_text(encoding="utf-8")))
            except (ValueError, OSError, RecursionError) as error:
                self.complaint = f"Your progress could not be read ({error}); it is kept in {_set_aside(path)}."

    def page(self, name: str) -> dict[str, Any]:
        """What was done on a page: `answers`, `guesses`, `code` and `place`."""
        return self.pages.get(name, {})

    def change(self, name: str, given: Mapping[str, Any]) -> None:
        """Notes what was done on a page. An entry that is None is forgotten.

        Raises:
            ValueError: for what is no progress, or would make the file too large.
        """
        _check_page(given)
        made = {**self.pages.get(name, {})}
        for key, value in given.items():
            if key == "place":
                made["place"] = value
            else:
                merged = {**made.get(key, {}), **value}
                made[key] = {k: v for k, v in merged.items() if v is not None}
        self._write({**self.pages, name: made})

    def reset(self, name: str | None = None) -> None:
        """Forgets a page, or everything."""
        self._write({key: value for key, value in self.pages.items() if name is not None and key != name})

    def text(self) -> str:
        """The file's contents."""
        return json.dumps({"version": VERSION, "pages": self.pages}, indent=1, ensure_ascii=False)

    def _write(self, pages: dict[str, dict[str, Any]]) -> None:
        before, self.pages = self.pages, pages
        text = self.text()
        if len(text.encode()) > LARGEST_FILE:
            self.pages = before
            raise ValueError(f"progress may take {LARGEST_FILE // 1024**2} MiB")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            handle, name = tempfile.mkstemp(dir=self.path.parent, prefix=self.path.stem, suffix=".part")
            try:
                with os.fdopen(handle, "w", encoding="utf-8") as file:
                    file.write(text)
                Path(name).replace(self.path)
            except OSError:
                Path(name).unlink(missing_ok=True)
                raise
            self.complaint = ""
        except OSError as error:
            self.complaint = f"Your progress cannot be saved in {self.path}: {error.strerror or error}."


def _set_aside(path: Path) -> Path:
    """Renames a file to a name that is free, and that is no learner's."""
    count = 1
    while (aside := path.with_name(f"{path.name}.unreadable-{count}")).exists():
        count += 1
    path.replace(aside)
    return aside


def _checked(found: Any) -> dict[str, dict[str, Any]]:
    if not isinstance(found, dict) or found.get("version") != VERSION or not isinstance(found.get("pages"), dict):
        raise ValueError("it is not a progress file of this version")
    for page in found["pages"].values():
        _check_page(page)
    return dict(found["pages"])


def _check_page(given: Any) -> None:
    """What a page's progress may be.

    Raises:
        ValueError: for anything else.
    """
    json.dumps(given, ensure_ascii=False).encode()  # half a letter cannot be written
    if not isinstance(given, Mapping) or set(given) - {"answers", "guesses", "code", "place"}:
        raise ValueError("progress has answers, guesses, code and a place")
    for key, entries in given.items():
        if key == "place":
            if not isinstance(entries, str) or len(entries) > 200:
                raise ValueError("a place is the name of a section")
        elif not isinstance(entries, Mapping) or not all(
            isinstance(name, str) and len(name) <= 200 and isinstance(value, str | int | None)
            for name, value in entries.items()
        ):
            raise ValueError(f"{key} are texts or numbers by name")
