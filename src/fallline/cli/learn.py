"""`fallline learn`: opens the course, and writes it as files."""

from __future__ import annotations

import getpass
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    help="Open the course on loss functions and optimization in a browser: read it, run it, change it.",
    invoke_without_command=True,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)

Repository = Annotated[
    str,
    typer.Option(
        envvar="FALLLINE_REPOSITORY",
        help="Where the notebooks lie on GitHub, as OWNER/NAME/blob/BRANCH/FOLDER: pages then link to Colab.",
    ),
]


@app.callback()
def learn(
    context: typer.Context,
    port: Annotated[
        int | None, typer.Option(min=0, max=65535, help="[dim]\\[default: 8426, or any that is free][/]")
    ] = None,
    browser: Annotated[bool, typer.Option(help="Open a browser.")] = True,
    learner: Annotated[
        str, typer.Option(help="Whose progress is kept. [dim]\\[default: this machine's user][/]", show_default=False)
    ] = "",
    memory: Annotated[
        float | None,
        typer.Option(min=0.5, max=1e6, help="GiB for the code of a page. [dim]\\[default: half, at most 4][/]"),
    ] = None,
    repository: Repository = "",
) -> None:
    """Open the course on loss functions and optimization in a browser: read it, run it, change it."""
    if context.invoked_subcommand is not None:
        for name in context.params:
            if getattr(context.get_parameter_source(name), "name", "") == "COMMANDLINE":
                raise typer.BadParameter(f"give it after {context.invoked_subcommand}.", param_hint=f"--{name}")
        return
    from fallline.lessons import progress, start

    start.serve(
        port=port,
        progress=progress.file_of(learner or _user()),
        repository=_checked(repository),
        memory=None if memory is None else int(memory * 1024**3),
        browser=browser,
        say=typer.echo,
    )


@app.command()
def export(
    notebook: Annotated[
        bool, typer.Option("--notebook", help="Notebooks that run with torch and matplotlib alone, as on Colab.")
    ] = False,
    site: Annotated[
        bool, typer.Option("--site", help="Pages that are read offline, without a server or a script.")
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(help="A directory. [dim]\\[default: notebooks, or course with --site][/]", show_default=False),
    ] = None,
    repository: Repository = "",
) -> None:
    """Write the course as notebooks, or as pages with the notebooks beside them."""
    from fallline.errors import InvalidCourse
    from fallline.lessons import notebooks
    from fallline.lessons import site as pages

    if notebook == site:
        raise InvalidCourse("give either --notebook or --site.")
    folder = out or Path("notebooks" if notebook else "course")
    try:
        written = notebooks.write(folder) if notebook else pages.write(folder, repository=_checked(repository))
    except OSError as error:
        raise InvalidCourse(f"--out {folder} cannot be written: {error.strerror or error}.") from error
    for path in written:
        typer.echo(path)


def _user() -> str:
    """This machine's user; "learner" where nobody knows them, as in some containers."""
    try:
        return getpass.getuser()
    except (KeyError, OSError, ImportError):
        return "learner"


def _checked(repository: str) -> str:
    """A repository as it stands in an address, or nothing.

    Raises:
        InvalidCourse: for one that Colab could not open.
    """
    import re

    from fallline.errors import InvalidCourse

    given = repository.strip("/")
    if given and (not re.fullmatch(r"[\w.-]+/[\w.-]+/blob/[\w./-]+", given) or {".", ".."} & {*given.split("/")}):
        raise InvalidCourse(
            f"--repository {repository!r} is not OWNER/NAME/blob/BRANCH/FOLDER, as in the address of the folder."
        )
    return given
