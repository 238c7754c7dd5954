"""The ranking of a sweep in the terminal: the answer, a table and the warnings, in 100 columns."""

from __future__ import annotations

import io
import math
from typing import TYPE_CHECKING

from fallline.evidence import Entry
from fallline.evidence.sentences import interval_text, metric_text, probability, setting
from fallline.reports import reading
from fallline.reports.reading import Result

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

COLUMNS = 100
"""The width that a summary keeps to."""


def ranking_table(result: Result) -> Table:
    """The ranking as a table for a Rich console, one row per optimizer, best first.

    Columns: place, optimizer, tuned hyperparameters (▲ or ▼ where a value is the highest or lowest of its
    grid), metric with its interval, probability of beating the next, decades of learning rates within 5 % of
    the best, and the share of all trials that diverged.

    Args:
        result: of a sweep.

    Example: `rich.print(ranking_table(result))`
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    ranking = result.ranking
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1), header_style="bold")
    table.add_column("")
    table.add_column("optimizer", overflow="fold")
    table.add_column("tuned at", overflow="fold")
    table.add_column(f"{ranking.metric}\n({100 * ranking.confidence:g} % interval)", no_wrap=True)
    table.add_column("beats\nnext", justify="right")
    table.add_column("lr room\ndecades", justify="right")
    table.add_column("trials\ndiverged", justify="right")
    for place, entry in enumerate(ranking, start=1):
        style = "bold" if place == 1 and math.isfinite(entry.mean) else ""
        table.add_row(
            str(place),
            # Text, not markup: a label may hold square brackets.
            Text(entry.label, style=style),
            Text(tuned_text(entry)),
            Text(score_text(entry), style=style),
            probability(entry.beats_next),
            room_text(entry),
            share_text(reading.diverged_share(result, entry)),
        )
    return table


def summary(result: Result, width: int = COLUMNS) -> str:
    """What a sweep found, as plain text: the answer, the table, and what to be careful about.

    Args:
        result: of a sweep.
        width: the number of columns to keep to.
    """
    from rich.table import Table
    from rich.text import Text

    parts: list[RenderableType] = [Text(result.ranking.sentence), ranking_table(result)]
    warnings = Table.grid(padding=(0, 1))
    for caution in reading.cautions(result):
        warnings.add_row("!", Text(caution))
    if warnings.row_count:
        parts.append(warnings)
    return _rendered(parts, width)


def _rendered(parts: list[RenderableType], width: int) -> str:
    from rich.console import Console

    # In a notebook Rich would show the table by itself, besides what is made of the text.
    console = Console(
        file=io.StringIO(), width=width, color_system=None, highlight=False, legacy_windows=False, force_jupyter=False
    )
    with console.capture() as captured:
        for part in parts:
            console.print(part)
    return "\n".join(line.rstrip() for line in captured.get().splitlines())


def tuned_text(entry: Entry) -> str:
    """The tuned hyperparameters, ▲ or ▼ after a value at an end of its grid; "–" if none was searched."""
    marks = {name: " ▲" if side == "high" else " ▼" for name, side in entry.on_edge}
    return ", ".join(f"{setting({name: value})}{marks.get(name, '')}" for name, value in entry.setting.items()) or "–"


def score_text(entry: Entry) -> str:
    """The mean and its interval: "0.975 (0.969 to 0.980)"."""
    if not math.isfinite(entry.mean):
        return "diverged"
    return f"{metric_text(entry)} ({interval_text(entry)})"


def room_text(entry: Entry) -> str:
    """The decades of learning rates within 5 % of the best; "–" where only one was tried."""
    if entry.lr_decades is None or entry.lr_alternatives == 0:
        return "–"
    return f"{entry.lr_decades:.1f}"


def share_text(share: float) -> str:
    """A share in percent, "0 %" and "100 %" only where they are exact.

    >>> share_text(0.0), share_text(0.002), share_text(0.25), share_text(0.999)
    ('0 %', '< 1 %', '25 %', '> 99 %')
    """
    if not math.isfinite(share):
        return "–"
    if 0 < share < 0.01:
        return "< 1 %"
    if 0.99 < share < 1:
        return "> 99 %"
    return f"{100 * share:.0f} %"
