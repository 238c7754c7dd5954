"""The commands: `fit`, `sweep`, `report`, `check`, `learn`, and the lists `tasks`, `optimizers`, `losses`."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from fallline import __version__
from fallline.cli import learn, options

if TYPE_CHECKING:
    from fallline.sweeps.result import Result

# Where no terminal watches, a line is as long as it needs to be.
PIPED_WIDTH = 200
ROOM_FOR_ALL_COLUMNS = 140

app = typer.Typer(
    help="Find out which loss, optimizer and learning rate train a PyTorch model best, and see why.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

app.add_typer(learn.app, name="learn")

Task = Annotated[
    str,
    typer.Argument(
        help="A built-in task (see [bold]fallline tasks[/]), path/to/file.py:attribute, or package.module:attribute.",
        show_default=False,
    ),
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"fallline {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    """Find out which loss, optimizer and learning rate train a PyTorch model best, and see why."""


@app.command()
def fit(
    task: Task,
    optimizer: Annotated[
        str, typer.Option(help="NAME, or NAME:argument=value,… (see [bold]fallline optimizers[/]).")
    ] = "adam",
    lr: Annotated[
        str | None, typer.Option(help="Learning rate; the optimizer's default without it.", show_default=False)
    ] = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the training data. [dim]\\[default: 20][/]")] = None,
    steps: Annotated[int | None, typer.Option(help="Updates, instead of epochs.", show_default=False)] = None,
    loss: Annotated[str | None, typer.Option(help="A loss by name, instead of the task's.")] = None,
    seed: Annotated[int, typer.Option(help="Of the parameters and the order of the mini-batches.")] = 0,
    patience: Annotated[
        int | None, typer.Option(help="Stop when the metric has not improved for so many epochs; keep the best.")
    ] = None,
    device: Device = "auto",
    out: Annotated[Path | None, typer.Option(help="A directory for checkpoints.", show_default=False)] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the checkpoint in --out.")] = False,
) -> None:
    """Train one configuration with one seed, and say how it went."""
    import fallline as fl
    from fallline.optim.catalogue import parse
    from fallline.training.fit import EpochReport

    _require_directory(resume, out)
    arguments = {} if lr is None else {"lr": options.one_learning_rate(lr)}
    options.refuse_two_learning_rates(optimizer, lr)
    made = parse(optimizer, **arguments)
    chosen = fl.tasks.resolve(task)

    def tell(report: EpochReport) -> None:
        every = max(1, report.epochs // 10)
        if report.epoch % every == 0 or report.epoch == report.epochs:
            typer.echo(f"Epoch [{report.epoch}/{report.epochs}], Loss: {report.loss:.4f}")

    go_on = f"go on with: {_command(resume=resume)}" if out else "give --out DIR to be able to go on next time."
    try:
        with _warnings_as_sentences():
            run = fl.fit(
                chosen, made, loss=loss, epochs=epochs, steps=steps, seed=seed, device=device, patience=patience,
                out=out, resume=resume, on_epoch=tell,
            )  # fmt: skip
    except KeyboardInterrupt:
        typer.echo(f"Stopped at once; {go_on}", err=True)
        raise typer.Exit(130) from None
    if len(run.history.metric) and run.stopped != "diverged":
        typer.echo(f"{run.task.metric.name} on validation data: {run.history.metric[-1]:.4f}")
    typer.echo(str(run.verdict))
    if run.stopped == "early stopping":
        typer.echo(f"Stopped after {run.steps} steps: no better for {patience} epochs; the best model is kept.")
    if run.stopped == "interrupted":
        typer.echo(f"Interrupted after {run.steps} steps; {go_on}", err=True)
        raise typer.Exit(130)


@app.command()
def sweep(
    task: Task,
    optimizer: Annotated[
        list[str] | None,
        typer.Option(
            help="NAME, or NAME:argument=value,…; may be repeated. "
            "[dim]\\[default: sgd, sgd:momentum=0.9, rmsprop, adam][/]",
            show_default=False,
        ),
    ] = None,
    loss: Annotated[
        list[str] | None, typer.Option(help="A loss by name; may be repeated. [dim]\\[default: the task's][/]")
    ] = None,
    lr: Annotated[
        str | None,
        typer.Option(
            help="LOW:HIGH:N learning rates at equal ratios, or a list 0.01,0.1. "
            "[dim]\\[default: 13 over each optimizer's usual range][/]",
            show_default=False,
        ),
    ] = None,
    seeds: Annotated[int, typer.Option(help="Seeds per configuration; 8 or more let the ranking be sure.")] = 10,
    steps: Annotated[int | None, typer.Option(help="Updates per trial. [dim]\\[default: 1000][/]")] = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the training data, instead of steps.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="The run directory. [dim]\\[default: runs/TASK][/]", show_default=False)
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out.")] = False,
    engine: Annotated[str, typer.Option(help="auto, vectorised, compiled or sequential.")] = "auto",
    device: Device = "auto",
    workers: Annotated[str, typer.Option(help="Processes that train side by side on the CPU.")] = "auto",
    report: Annotated[bool, typer.Option(help="Write report.html into the run directory.")] = True,
) -> None:
    """Train every optimizer at every learning rate with every seed, at once, and rank them."""
    import fallline as fl
    from fallline.errors import InvalidSweep

    made = options.optimizers(optimizer or [], lr)
    count: int | str = workers
    if workers != "auto":
        if not workers.isdigit():
            raise InvalidSweep(f"--workers {workers!r} is neither auto nor a whole number.")
        count = int(workers)
    _require_directory(resume, out)
    chosen = fl.tasks.resolve(task)
    folder = options.run_directory(out, chosen)
    go_on = f"what was done is kept in {folder}. Go on with: {_command(resume=resume, out=None if out else folder)}"
    try:
        with _warnings_as_sentences():
            result = fl.sweep(
                chosen, made, loss or None, seeds=seeds, steps=steps, epochs=epochs, engine=engine, device=device,
                workers=count, out=folder, resume=resume, task_code=options.task_code(task), command=_command(),
            )  # fmt: skip
    except KeyboardInterrupt:
        typer.echo(f"Stopped at once: {go_on}" if folder.exists() else "Stopped before anything was trained.", err=True)
        raise typer.Exit(130) from None
    _show(result)
    if not result.complete:
        typer.echo(f"Interrupted: {go_on}", err=True)
        raise typer.Exit(130)
    if report:
        _report(result)


@app.command()
def report(
    directory: Annotated[Path, typer.Argument(help="The run directory of a sweep.", show_default=False)],
    out: Annotated[
        Path | None, typer.Option(help="Where to write it. [dim]\\[default: DIRECTORY/report.html][/]")
    ] = None,
) -> None:
    """Print the ranking of a sweep again, and write its HTML report."""
    import fallline as fl

    result = fl.load(directory)
    _show(result)
    _report(result, out)


@app.command()
def check(
    task: Task,
    loss: Annotated[str | None, typer.Option(help="A loss by name, instead of the task's.")] = None,
    seed: Annotated[int, typer.Option(help="Of the model that is looked at.")] = 0,
    device: Device = "auto",
) -> None:
    """Look for what is wrong before training: the loss, the model, the data. Exit code 1 for an error."""
    import fallline as fl
    from fallline.diagnosis import examine

    chosen = fl.tasks.resolve(task)
    if loss is not None:
        chosen = chosen.with_loss(loss)
    count = {"error": 0, "warning": 0, "note": 0}
    for outcome in examine(chosen, seed=seed, device=device):
        worst = min((finding.severity for finding in outcome.findings), key=list(count).index, default="ok")
        typer.echo(f"{_styled(worst)} {outcome.check}: {outcome.figure}")
        for finding in outcome.findings:
            count[finding.severity] += 1
            typer.echo(f"        {typer.style(finding.code, bold=True)}: {finding.message}")
            typer.echo(f"        Fix: {typer.style(finding.fix, fg='cyan')}")
    told = ", ".join(f"{number} {name}{'' if number == 1 else 's'}" for name, number in count.items() if number)
    typer.echo(f"{chosen.name}: {told or 'nothing to complain of'}.")
    if count["error"]:
        raise typer.Exit(1)


def _styled(severity: str) -> str:
    colours = {"error": "red", "warning": "yellow", "note": "blue", "ok": "green"}
    return typer.style(f"{severity:>7}", fg=colours[severity], bold=severity == "error")


@app.command()
def tasks() -> None:
    """List the built-in tasks."""
    from fallline.tasks import describe_builtins

    _list(describe_builtins())


@app.command()
def optimizers() -> None:
    """List the optimizers: update, state per parameter, source."""
    from fallline.optim.catalogue import CATALOGUE, state_of

    rows = []
    for info in CATALOGUE.values():
        size, _ = state_of(info.make(**info.valid[0]))
        rows.append((info.name, f"{size:.2g}", info.formula, f"{info.paper} {info.year}" if info.paper else ""))
    _list(rows, ("optimizer", "state", "update", "source"))
    typer.echo("State: numbers kept for each number of a 1024 × 1024 matrix. Use: NAME, NAME:argument=value,…")
    typer.echo("or, of those that go around another, NAME(OTHER). Arguments: help(fl.optim.NAME) in Python.")


@app.command()
def losses() -> None:
    """List the losses: prediction, target, formula."""
    from fallline.losses.catalogue import CATALOGUE

    rows = []
    for info in CATALOGUE.values():
        loss = info.plain()
        prediction, target = loss.shapes
        rows.append((info.name, f"{loss.prediction} {prediction}", f"{loss.target} {target}", loss.formula))
    _list(rows, ("loss", "prediction", "target", "formula"))
    typer.echo("Use: --loss NAME, or NAME:argument=value,… Arguments and sources: help(fl.losses.NAME) in Python.")


def _list(rows: Sequence[tuple[str, ...]], titles: Sequence[str] = ()) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = PIPED_WIDTH
    elif len(rows[0]) > 2 and console.width < ROOM_FOR_ALL_COLUMNS:  # the last column under the one before
        rows = [(*row[:-2], f"{row[-2]}\n{row[-1]}".strip()) for row in rows]
        titles = titles[:-1]
    table = Table(box=None, show_header=bool(titles), padding=(0, 2, 0, 0))
    for column, title in enumerate(titles or [""] * len(rows[0])):
        table.add_column(title, style="bold" if column == 0 else "", no_wrap=column == 0)
    for row in rows:
        table.add_row(*(text.replace("[", "\\[") for text in row))
    console.print(table)


def _require_directory(resume: bool, out: Path | None) -> None:
    from fallline.errors import RunDirectoryError

    if resume and out is None:
        raise RunDirectoryError("--resume needs the directory of the run: give --out DIR.")


@contextmanager
def _warnings_as_sentences() -> Iterator[None]:
    """A warning of ours is a sentence on standard error, without the place in the code that warned."""
    import warnings

    from fallline.errors import LossMisused, TrainedSequentially

    with warnings.catch_warnings():
        for ours in (LossMisused, TrainedSequentially):
            warnings.simplefilter("always", ours)
        others = warnings.showwarning

        def show(message: Warning | str, category: type[Warning], *place: Any, **named: Any) -> None:
            if category in (LossMisused, TrainedSequentially):
                typer.echo(f"fallline: {message}", err=True)
            else:
                others(message, category, *place, **named)

        warnings.showwarning = cast(Any, show)
        yield


def _show(result: Result) -> None:
    typer.echo(str(result))


def _report(result: Result, out: Path | None = None) -> None:
    from fallline.errors import RunDirectoryError

    try:
        typer.echo(f"Report: {result.report(out)}")
    except OSError as error:
        target = out or result.path / "report.html"
        raise RunDirectoryError(
            f"the report {target} could not be written: {error.strerror or error}. The run is whole; try again with: "
            f"fallline report {result.path}"
        ) from error


def _command(*, resume: bool = True, out: Path | None = None) -> str:
    """What was typed; with `--resume` if that was not among it, and with `--out` if there is one to be added."""
    import shlex

    added = [*(["--out", str(out)] if out else []), *([] if resume else ["--resume"])]
    return shlex.join(["fallline", *sys.argv[1:], *added])
