"""The HTML report of a sweep: one file that holds all it needs and asks the network for nothing.

The words and their order are in `report.html.jinja`, the looks in `report.css`, what happens in the browser
in `report.js`. Here they are put together with the numbers; `charts` makes the charts.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fallline.errors import RunDirectoryError
from fallline.evidence import Entry, Ranking
from fallline.evidence.sentences import answer_parts, number, probability
from fallline.reports import charts, reading, style, tables, vega
from fallline.reports.charts import Chart
from fallline.reports.reading import Result

if TYPE_CHECKING:
    from markupsafe import Markup


def html(result: Result) -> str:
    """The report of a sweep as one self-contained HTML page.

    It holds the answer in a sentence, the charts, the ranking, how it was made, the exact settings, and the
    code that reproduces the winner. Everything but the interactive charts also works without JavaScript,
    which then shows still ones.

    Args:
        result: of a sweep; read through the attributes that `reading.Result` lists.

    Example: `Path("report.html").write_text(html(result), encoding="utf-8")`
    """
    import jinja2
    from markupsafe import Markup

    with vega.bundling() as bundled:
        found = [_figure(chart) for chart in charts.charts(result)]
        ranking = result.ranking
        headline, details = answer_parts(ranking)
        environment = jinja2.Environment(
            loader=jinja2.PackageLoader("fallline", "reports"),
            autoescape=True,
            undefined=jinja2.StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        return environment.get_template("report.html.jinja").render(
            spec=result.spec,
            ranking=ranking,
            headline=headline,
            details=details,
            rows=_rows(result),
            cautions=reading.cautions(result),
            figures=found,
            method=method(ranking),
            settings=settings(result),
            winner_code=result.reproduction_code().strip("\n"),
            sweep_code=sweep_code(result.spec),
            themes=_json(style.THEMES),
            light=style.LIGHT.split(),
            dark=style.DARK.split(),
            css=_asset("report.css"),
            script=_asset("report.js"),
            vega=Markup(bundled().replace("</script", "<\\/script")),
        )


def write_report(result: Result, path: str | os.PathLike[str]) -> Path:
    """Write the report of a sweep to a file: whole, or not at all.

    Args:
        result: of a sweep.
        path: the file; one of that name is replaced.

    Returns:
        The path written.

    Raises:
        RunDirectoryError: the file cannot be written (no such folder, no room, no permission).
    """
    target = Path(path)
    text = html(result)
    temporary: str | None = None
    try:
        # In the same folder, for a replacement within one file system is all or nothing.
        handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".part")
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes files that only their owner reads; a report is made to be shown.
        Path(temporary).chmod(0o644)
        Path(temporary).replace(target)
    except OSError as error:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        reason = error.strerror or str(error)
        raise RunDirectoryError(
            f"The report cannot be written to {str(target)!r}: {reason}. Choose another path."
        ) from error
    return target


@dataclass(frozen=True)
class _Row:
    """One line of the table, in words."""

    place: int
    label: str
    tuned: str
    score: str
    bar: tuple[float, float, float] | None
    beats_next: str
    p_value: str
    room: str
    decades: str | None
    diverged: str
    advice: str


def _rows(result: Result) -> list[_Row]:
    ends = [bound for entry in result.ranking for bound in entry.interval or () if math.isfinite(bound)]
    low, high = (min(ends), max(ends)) if ends else (0.0, 0.0)

    def bar(entry: Entry) -> tuple[float, float, float] | None:
        """Left end, width and mean of an interval, in percent of the span of all intervals."""
        if entry.interval is None or high <= low:
            return None
        left, right, middle = (100 * (value - low) / (high - low) for value in (*entry.interval, entry.mean))
        return round(left, 2), round(right - left, 2), round(middle, 2)

    return [
        _Row(
            place=place,
            label=entry.label,
            tuned=tables.tuned_text(entry),
            score=tables.score_text(entry),
            bar=bar(entry),
            beats_next=probability(entry.beats_next),
            p_value=p_text(entry.p_value),
            room=_range_text(entry),
            decades=f"{tables.room_text(entry)} decades" if entry.lr_decades and entry.lr_alternatives else None,
            diverged=tables.share_text(reading.diverged_share(result, entry)),
            advice=entry.advice,
        )
        for place, entry in enumerate(result.ranking, start=1)
    ]


def _range_text(entry: Entry) -> str:
    if entry.lr_low is None or entry.lr_alternatives == 0:
        return "–"
    if entry.lr_low == entry.lr_high:
        return f"only {entry.lr_low:.4g}"
    return f"{entry.lr_low:.4g} to {entry.lr_high:.4g}"


def p_text(value: float | None) -> str:
    """A p-value with two digits.

    >>> p_text(0.046875), p_text(0.5), p_text(0.00001), p_text(None)
    ('0.047', '0.50', '< 0.001', '–')
    """
    if value is None:
        return "–"
    if value < 0.001:
        return "< 0.001"
    return f"{value:.2f}" if value >= 0.1 else f"{value:.3f}"


def method(ranking: Ranking) -> list[str]:
    """How the ranking was made, in three sentences."""
    tuning, reporting = _listed(ranking.tuning_seeds), _listed(ranking.reporting_seeds)
    chose = (
        f"Seed {tuning} both chose each optimizer's configuration and reports it: the values are too good"
        if ranking.selection_bias
        else f"Each optimizer's configuration is the one with the best mean final {ranking.metric} "
        f"over the tuning seeds ({tuning}), and its value is the mean over the other seeds, which report "
        f"({reporting})"
    )
    return [
        f"{chose}; a trial that diverged counts as worse than any that finished.",
        f"Intervals are bias-corrected and accelerated {100 * ranking.confidence:g} % bootstrap intervals "
        "of that mean, widened for few seeds; “beats the next” is the share of "
        f"{ranking.resamples:,} paired bootstrap samples of the seeds in which the mean is better, ties "
        "counting half.",
        "p comes from a two-sided sign-flip permutation test on the paired differences between neighbours, "
        f"Holm-adjusted for all of them; from {ranking.level:g} upwards, the report says that there "
        "is no evidence.",
    ]


def settings(result: Result) -> list[tuple[str, str]]:
    """The exact settings of a sweep, as pairs of name and value, in the order of the page."""
    spec, ranking = result.spec, result.ranking
    task = spec["task"]
    statuses = result.trials["status"].value_counts().sort("status").rows()
    outcome = ", ".join(f"{count:,} {status}" for status, count in statuses)
    epochs = f" ({spec['epochs']:.4g} epochs)" if spec.get("epochs") else ""
    batches = f"{task['batch_size']} samples" if task.get("batch_size") else "the whole training set"
    last = "left out" if task.get("drop_last") else "kept"
    samples = f"{task['samples']:,} samples for training, {task['validation_samples']:,} for validation"
    reason = f": {spec['engine_reason']}" if spec.get("engine_reason") else ""
    workers = f"{spec['workers']} worker{'' if spec['workers'] == 1 else 's'}"
    return [
        ("Task", str(task["name"])),
        ("Data", f"{task['source']}; {samples}"),
        ("Loss", ", ".join(loss["label"] for loss in spec["losses"]) or str(task["loss"])),
        ("Metric", f"{task['metric']}, {'higher' if task['higher_is_better'] else 'lower'} is better"),
        ("Mini-batches", f"{batches}; a shorter last one is {last}"),
        ("Batch order", str(spec["batch_order"])),
        ("Trials", f"{result.trials.height:,}: {outcome}"),
        ("Steps", f"{spec['steps']:,} per trial{epochs}"),
        ("Tuning seeds", _listed(ranking.tuning_seeds)),
        ("Reporting seeds", _listed(ranking.reporting_seeds)),
        ("Engine", f"{spec['engine']}{reason}"),
        ("Device", f"{spec['device']}, {task['dtype']}, {workers}"),
        ("Time", f"{_duration(spec['seconds'])}, {number(spec['trials_per_second'])} trials per second"),
        ("Versions", ", ".join(f"{name} {version}" for name, version in spec["versions"].items())),
        ("Made", str(spec["created"])),
    ]


def sweep_code(spec: Any) -> str:
    """What to run to make the sweep again: its command, or the Python call."""
    if spec.get("command"):
        return str(spec["command"])
    several = len(spec["losses"]) > 1 or "fl.grid" in spec["losses"][0]["code"]
    lines = [
        "import fallline as fl",
        "",
        "result = fl.sweep(",
        f"    {spec.get('task_code') or 'task'},  # {spec['task']['name']}",
        "    optimizers=[",
        *(f"        {optimizer['code']}," for optimizer in spec["optimizers"]),
        "    ],",
        *(["    losses=[", *(f"        {loss['code']}," for loss in spec["losses"]), "    ],"] if several else []),
        f"    seeds={list(spec['seeds'])!r},",
        f"    steps={spec['steps']},",
        f"    engine={spec['engine']!r},",
        f"    device={spec['device']!r},",
        ")",
    ]
    return "\n".join(lines)


@dataclass(frozen=True)
class _Figure:
    """A chart as the page shows it."""

    chart: Chart
    spec: Markup
    still: Markup


def _figure(chart: Chart) -> _Figure:
    from markupsafe import Markup

    return _Figure(chart, _json(chart.spec), Markup(vega.still(chart.name, chart.spec, style.THEMES["light"])))


def _json(value: Any) -> Markup:
    """JSON that can stand inside a script element: no "<" in it can end the element or start a comment."""
    from markupsafe import Markup

    text = json.dumps(value, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    escapes = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026", "\u2028": "\\u2028", "\u2029": "\\u2029"}
    return Markup("".join(escapes.get(character, character) for character in text))


def _asset(name: str) -> Markup:
    from markupsafe import Markup

    return Markup(resources.files("fallline.reports").joinpath(name).read_text(encoding="utf-8"))


def _listed(seeds: tuple[int, ...]) -> str:
    """Seeds as a range where they are one.

    >>> _listed((0, 1, 2)), _listed((3,)), _listed((1, 5))
    ('0 to 2', '3', '1, 5')
    """
    if len(seeds) > 2 and list(seeds) == list(range(seeds[0], seeds[0] + len(seeds))):
        return f"{seeds[0]} to {seeds[-1]}"
    return ", ".join(map(str, seeds))


def _duration(seconds: float) -> str:
    """A duration in the unit that suits it.

    >>> _duration(41.3), _duration(600), _duration(9000)
    ('41.3 s', '10.0 min', '2.5 h')
    """
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
