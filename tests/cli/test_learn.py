"""`fallline learn`: what it writes, what it hands to the server, and what it says to what it cannot use."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fallline.lessons import site, start
from fallline.lessons.course import ORDER

REPOSITORY = "someone/course/blob/main/notebooks"
PAGES = ["index", *ORDER]


@pytest.fixture(autouse=True)
def own_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing of the machine's own settings and progress."""
    monkeypatch.delenv("FALLLINE_REPOSITORY", raising=False)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What the server would have been started with; it is not started."""
    found: list[dict[str, Any]] = []
    monkeypatch.setattr(start, "serve", lambda **given: found.append(given))
    return found


def plain(text: str) -> str:
    """What a message says, without the frame around it."""
    return " ".join(re.sub(r"[│╭╮╰╯─]", " ", text).split())


# Files.


def test_notebooks_are_written_and_named(fallline):
    ended = fallline("learn", "export", "--notebook")
    assert (ended.code, ended.err) == (0, "")
    assert ended.out.splitlines() == [f"notebooks/{name}.ipynb" for name in ORDER]
    for name in ORDER:
        assert json.loads(Path(f"notebooks/{name}.ipynb").read_text(encoding="utf-8"))["nbformat"] == 4
    assert [path.name for path in Path().iterdir()] == ["notebooks"]


def test_pages_are_written_with_the_notebooks_beside_them(fallline):
    ended = fallline("learn", "export", "--site")
    assert (ended.code, ended.err) == (0, "")
    assert ended.out.splitlines() == [f"course/{name}.html" for name in PAGES]
    assert all(Path(line).is_file() for line in ended.out.splitlines())
    assert Path(f"course/notebooks/{ORDER[0]}.ipynb").is_file()
    assert [path.name for path in Path().iterdir()] == ["course"]


@pytest.mark.parametrize(("what", "written"), [("--notebook", "ipynb"), ("--site", "html")])
def test_they_are_written_where_one_wants_them(fallline, what: str, written: str):
    ended = fallline("learn", "export", what, "--out", "some/where else")
    assert ended.code == 0
    assert ended.out.splitlines()
    for line in ended.out.splitlines():
        assert line.startswith("some/where else/")
        assert line.endswith(f".{written}")
        assert Path(line).is_file()
    assert fallline("learn", "export", what, "--out", "some/where else").out == ended.out, "once more is as good"


@pytest.mark.parametrize("both", [[], ["--notebook", "--site"]])
def test_it_is_notebooks_or_pages(fallline, both: list[str]):
    ended = fallline("learn", "export", *both)
    assert (ended.code, ended.out) == (2, "")
    assert ended.err == "fallline: give either --notebook or --site.\n"
    assert not list(Path().iterdir())


@pytest.mark.parametrize("what", ["--notebook", "--site"])
@pytest.mark.parametrize("out", ["taken", "taken/inside"])
def test_a_file_in_the_way_is_one_sentence(fallline, what: str, out: str):
    Path("taken").write_text("mine")
    ended = fallline("learn", "export", what, "--out", out)
    assert (ended.code, ended.out) == (2, "")
    assert ended.err.startswith(f"fallline: --out {out} cannot be written: ")
    assert ended.err.count("\n") == 1
    assert ended.err.endswith(".\n")
    assert Path("taken").read_text() == "mine"


def test_a_folder_in_the_way_of_a_page_is_one_sentence(fallline):
    Path("course/index.html").mkdir(parents=True)
    ended = fallline("learn", "export", "--site")
    assert ended.code == 2
    assert ended.err.startswith("fallline: --out course cannot be written: ")


# The repository.


def links(folder: str) -> set[str]:
    """The addresses by which the pages of a folder are gone on with."""
    texts = [Path(folder, f"{name}.html").read_text(encoding="utf-8") for name in ORDER]
    return {address for text in texts for address in re.findall(r'class="interactive" href="([^"]*)"', text)}


@pytest.mark.parametrize("given", [REPOSITORY, f"/{REPOSITORY}/"])
def test_pages_link_to_colab_where_the_notebooks_lie(fallline, given: str):
    assert fallline("learn", "export", "--site", "--repository", given).code == 0
    assert links("course") == {site.colab(REPOSITORY, name) for name in ORDER}


def test_the_environment_may_say_where_they_lie_and_the_command_line_overrules_it(
    fallline, monkeypatch: pytest.MonkeyPatch
):
    assert fallline("learn", "export", "--site", "--out", "without").code == 0
    monkeypatch.setenv("FALLLINE_REPOSITORY", REPOSITORY)
    assert fallline("learn", "export", "--site", "--out", "with").code == 0
    assert fallline("learn", "export", "--site", "--out", "other", "--repository", "a/b/blob/c/d").code == 0
    assert links("without") == {f"notebooks/{name}.ipynb" for name in ORDER}
    assert links("with") == {site.colab(REPOSITORY, name) for name in ORDER}
    assert links("other") == {site.colab("a/b/blob/c/d", name) for name in ORDER}


@pytest.mark.parametrize(
    "given",
    [
        "someone",
        "someone/course",
        "someone/course/tree/main/notebooks",
        "someone/course/blob",
        "https://github.com/someone/course/blob/main/notebooks",
        "some one/course/blob/main/notebooks",
        "someone/course/blob/main/notebooks?x=1",
        'someone/course/blob/main/"><script>',
        "someone/course/blob/main/notebooks\n",
        "../../blob/main/notebooks",
        "someone/course/blob/../../../elsewhere",
    ],
)
@pytest.mark.parametrize("words", [["learn", "export", "--site"], ["learn"]])
def test_a_repository_that_colab_could_not_open_is_one_sentence(
    fallline, served: list[object], monkeypatch: pytest.MonkeyPatch, words: list[str], given: str
):
    sentence = (
        f"fallline: --repository {given!r} is not OWNER/NAME/blob/BRANCH/FOLDER, as in the address of the folder."
    )
    ended = fallline(*words, "--repository", given)
    assert (ended.code, ended.out) == (2, "")
    assert ended.err.splitlines() == [sentence]
    monkeypatch.setenv("FALLLINE_REPOSITORY", given)
    assert fallline(*words).err.splitlines() == [sentence]
    assert served == []
    assert not list(Path().iterdir())


# What the server is started with.


def test_the_course_is_served_with_what_was_asked_for(fallline, served: list[dict[str, Any]]):
    words = ["--port", "0", "--no-browser", "--learner", "ann", "--memory", "1.5", "--repository", REPOSITORY]
    ended = fallline("learn", *words)
    assert (ended.code, ended.err) == (0, "")
    (given,) = served
    assert given.pop("say")
    assert given.pop("progress").name == "ann.json"
    assert given == {"port": 0, "browser": False, "memory": 3 * 1024**3 // 2, "repository": REPOSITORY}


def test_without_a_word_it_is_this_machines_user(
    fallline, served: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("getpass.getuser", lambda: "zoë")
    assert fallline("learn").code == 0
    (given,) = served
    assert given["progress"].name == "zoë.json"
    assert (given["port"], given["memory"], given["browser"], given["repository"]) == (None, None, True, "")


@pytest.mark.parametrize(
    "error", [KeyError("getpwuid(): uid not found: 1000"), OSError("No username set"), ImportError("pwd")]
)
def test_a_machine_that_does_not_know_its_user_is_no_defect(
    fallline, served: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, error: Exception
):
    """As in a container that runs under a number. It opens all the same, or says how to give a name."""

    def unknown() -> str:
        raise error

    monkeypatch.setattr("getpass.getuser", unknown)
    ended = fallline("learn")
    assert (ended.code == 0 and len(served) == 1) or (ended.code == 2 and "--learner" in ended.err)
    assert fallline("learn", "--learner", "ann").code == 0
    assert served[-1]["progress"].name == "ann.json"


@pytest.mark.parametrize("name", ["DOMAIN\\ann", "Ann Other", "a/b"])
def test_a_user_whose_name_is_no_files_is_told_how_to_give_another(
    fallline, served: list[object], monkeypatch: pytest.MonkeyPatch, name: str
):
    monkeypatch.setattr("getpass.getuser", lambda: name)
    ended = fallline("learn")
    assert (ended.code == 0 and len(served) == 1) or (ended.code == 2 and "--learner" in ended.err)


@pytest.mark.parametrize("name", ["../x", "..", "a/b", "/etc/passwd", "a" * 65, "a b"])
def test_a_learner_who_would_leave_the_folder_is_refused(fallline, served: list[object], tmp_path: Path, name: str):
    ended = fallline("learn", "--no-browser", "--learner", name)
    assert (ended.code, ended.out) == (2, "")
    assert ended.err == (f"fallline: --learner {name!r} cannot name a file: use letters, digits, and any of _ . @ -\n")
    assert served == []
    assert not list(tmp_path.rglob("*"))


@pytest.mark.parametrize(("words", "named"), [
    (["--port", "-1"], "--port"), (["--port", "65536"], "--port"), (["--port", "any"], "--port"),
    (["--memory", "0.1"], "--memory"), (["--memory", "-1"], "--memory"), (["--memory", "nan"], "--memory"),
    (["--memory", "inf"], "--memory"), (["--memory", "much"], "--memory"), (["--learner"], "--learner"),
    (["elsewhere"], "elsewhere"), (["export", "--html"], "--html"), (["export", "--notebook", "more"], "more"),
])  # fmt: skip
def test_what_makes_no_sense_is_refused_by_name(fallline, served: list[object], words: list[str], named: str):
    ended = fallline("learn", *words)
    assert (ended.code, ended.out) == (2, "")
    assert named in plain(ended.err)
    assert served == []
    assert not list(Path().iterdir())


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """A port that somebody listens on already."""

    async def never(*arguments: object, **options: object) -> None:
        raise AssertionError("the server was started")

    monkeypatch.setattr("uvicorn.Server.serve", never)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


def test_a_port_that_is_taken_is_one_sentence_with_the_way_out(fallline, taken: int, tmp_path: Path):
    ended = fallline("learn", "--no-browser", "--port", str(taken), "--learner", "ann")
    assert (ended.code, ended.out) == (2, "")
    assert ended.err.startswith(f"fallline: --port {taken} cannot be used: ")
    assert ended.err.endswith(". Give another, or leave it out.\n")
    assert ended.err.count("\n") == 1
    assert not list(tmp_path.rglob("*.json"))


def test_without_a_port_another_one_is_found(taken: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(start, "PORT", taken)
    with start._listener(None) as listener:
        host, port = listener.getsockname()
    assert host == "127.0.0.1"
    assert port not in (0, taken)


# What it says of itself.


def test_help_names_what_there_is(fallline):
    assert " learn " in plain(fallline("--help").out)
    told = plain(fallline("learn", "--help").out)
    for word in (
        "--port",
        "--no-browser",
        "--learner",
        "--memory",
        "--repository",
        "FALLLINE_REPOSITORY",
        "export",
        "8426",
    ):
        assert word in told, word
    assert fallline("learn", "-h").out == fallline("learn", "--help").out
    told = plain(fallline("learn", "export", "--help").out)
    for word in ("--notebook", "--site", "--out", "--repository", "FALLLINE_REPOSITORY"):
        assert word in told, word


HEAVY = ("torch", "numpy", "polars", "matplotlib", "jupyter_client", "ipykernel", "IPython", "nbformat", "zmq")


@pytest.mark.parametrize("module", ["fallline.lessons.server", "fallline.lessons.start", "fallline.lessons.site"])
def test_the_first_page_waits_for_nothing_heavy(module: str):
    program = f"import sys, {module}; print([name for name in {HEAVY!r} if name in sys.modules])"
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "[]\n", "")


def test_writing_the_course_needs_nothing_heavy(tmp_path: Path):
    program = (
        "import sys\n"
        "from fallline.cli import main\n"
        "sys.argv = ['fallline', 'learn', 'export', '--site']\n"
        "try: main()\n"
        "except SystemExit as leaving: assert leaving.code == 0\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules])\n"
    )
    ended = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ended.stderr == ""
    assert ended.stdout.splitlines()[-1] == "[]"


def test_options_of_another_command_are_not_ignored(fallline):
    ended = fallline("learn", "--repository", "nonsense", "export", "--notebook")
    assert (ended.code, ended.out) == (2, "")
    assert "give it after export" in plain(ended.err)
    assert not list(Path().iterdir())
