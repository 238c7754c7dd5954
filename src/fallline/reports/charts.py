"""The charts of the report, as Vega-Lite specifications made with Altair, each with its summary in words.

The numbers come from `curves`, the looks from `style`; here is what is drawn of them, and what is said.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fallline.evidence import Entry
from fallline.evidence.sentences import number
from fallline.reports import curves, reading, style
from fallline.reports.curves import Row, Sensitivity
from fallline.reports.reading import Result

MOST = 10
"""More optimizers than this cannot be told apart in one chart: the best ones are drawn."""

DIMENSIONS = 3
"""So many searched hyperparameters have a chart of their own; lr comes first."""


@dataclass(frozen=True)
class Chart:
    """One chart of the report.

    Args:
        name: its id in the page.
        title: its heading.
        description: what it shows, for screen readers and as the line under the heading.
        findings: what is to be seen in it, a sentence per optimizer.
        spec: the Vega-Lite specification.
    """

    name: str
    title: str
    description: str
    findings: tuple[str, ...]
    spec: dict[str, Any]


def charts(result: Result) -> list[Chart]:
    """All the charts that the data permit, in the order of the page.

    The metric against every searched hyperparameter, the room for the learning rate, the training loss (one
    chart per loss) and the metric during training; the metric of every seed where nothing was searched.
    """
    entries = list(result.ranking)[:MOST]
    dimensions = reading.searched(result)
    found = [_sensitivity_chart(result, entries, dimension) for dimension in dimensions[:DIMENSIONS]]
    found.append(_room_chart(result, entries) if "lr" in dimensions else None)
    found.append(_seeds_chart(result, entries) if not dimensions else None)
    # Values of different losses are never compared with each other: each loss has a chart of its own.
    by_loss: dict[str, list[Entry]] = {}
    for entry in entries:
        by_loss.setdefault(reading.loss_of(result, entry), []).append(entry)
    for index, (loss, members) in enumerate(by_loss.items()):
        which = (f"training-loss-{index}", f" ({loss})") if len(by_loss) > 1 else ("training-loss", "")
        found.append(_loss_chart(result, entries, members, *which))
    found.append(_metric_chart(result, entries))
    return [chart for chart in found if chart is not None]


def _sensitivity_chart(result: Result, entries: Sequence[Entry], dimension: str) -> Chart | None:
    import altair as alt

    metric = result.ranking.metric
    data = curves.sensitivity(result, entries, dimension)
    if not data.rows:
        return None
    name = "learning rate" if dimension == "lr" else dimension
    values = [row["x"] for row in (*data.rows, *data.boundaries)]
    x = alt.X(
        "x:Q",
        title=name,
        scale=style.scale(values, spread=10),
        axis=style.axis(values, spread=10, grid=False),
    )
    scale, axis, cut = style.metric_scale(data.rows, result.ranking.higher_is_better, least=0.05)
    y = alt.Y("mean:Q", title=metric, scale=scale, axis=axis)
    series = style.Series(entries)
    tooltip = [
        alt.Tooltip("optimizer:N"),
        alt.Tooltip("x:Q", title=name, format="~g"),
        alt.Tooltip("mean:Q", title=f"mean {metric}", format=".4~g"),
        *_range_tooltips(),
        alt.Tooltip("diverged:Q", title="seeds diverged"),
        alt.Tooltip("seeds:Q", title="seeds in all"),
    ]
    base = alt.Chart().encode(x=x, color=series.color)
    clip = bool(cut)
    layers = [
        base.mark_area(clip=clip).encode(
            y=alt.Y("low:Q", title=metric, scale=scale, axis=axis), y2="high:Q", opacity=series.opacity(0.14)
        ),
        base.mark_line(clip=clip, strokeWidth=2).encode(y=y, opacity=series.opacity()),
        base.mark_point(clip=clip, filled=True, size=46).encode(
            y=y, opacity=series.opacity(), shape=series.shape, tooltip=tooltip
        ),
    ]
    if data.tuned:
        layers.append(
            alt.Chart(alt.NamedData("tuned"))
            .mark_point(clip=clip, filled=False, size=230, strokeWidth=1.8, shape="circle")
            .encode(x=x, y=y, color=series.color, opacity=series.opacity(), tooltip=tooltip)
        )
    if data.boundaries:
        layers.append(
            alt.Chart(alt.NamedData("boundaries"))
            .mark_rule(strokeDash=[4, 4], strokeWidth=1.5)
            .encode(
                x=x,
                color=series.color,
                opacity=series.opacity(0.75),
                tooltip=[
                    alt.Tooltip("optimizer:N"),
                    alt.Tooltip("x:Q", title=f"diverges from {name}", format="~g"),
                    alt.Tooltip("diverged:Q", title="seeds diverged"),
                    alt.Tooltip("seeds:Q", title="seeds in all"),
                ],
            )
        )
    held = ", other hyperparameters at their tuned values" if len(reading.searched(result)) > 1 else ""
    dashes = "; dashed lines: from here on some seed diverged" if data.boundaries else ""
    description = (
        f"Final validation {metric} against the {name}{held}. Lines: mean over the seeds that finished; "
        f"bands: lowest to highest seed; rings: tuned values{dashes}.{cut}"
    )
    tables = {"rows": data.rows, "tuned": data.tuned, "boundaries": data.boundaries}
    return Chart(
        name=f"sensitivity-{dimension}",
        title=f"{_capital(metric)} against {name}",
        description=description,
        findings=tuple(_sensitivity_findings(entries, data, name)),
        spec=series.specification(layers, tables, description),
    )


def _sensitivity_findings(entries: Sequence[Entry], data: Sensitivity, name: str) -> list[str]:
    tuned = {row["optimizer"]: row for row in data.tuned}
    boundaries = {row["optimizer"]: row for row in data.boundaries}
    said = []
    for entry in entries:
        parts = []
        if row := tuned.get(entry.label):
            parts.append(
                f"tuned at {name} {row['x']:.4g}, where the mean over the {row['finished']} seeds "
                f"that finished, tuning seeds among them, is {number(row['mean'])}"
            )
        if row := boundaries.get(entry.label):
            parts.append(f"some seed diverged from {name} {row['x']:.4g} on")
        elif parts:
            parts.append("no seed diverged")
        if parts:
            said.append(f"{entry.label}: {'; '.join(parts)}.")
    return said


def _room_chart(result: Result, entries: Sequence[Entry]) -> Chart | None:
    import altair as alt

    rows = curves.room(result, entries)
    if not rows:
        return None
    values = [value for row in rows for value in (row["lowest"], row["highest"])]
    place: dict[str, Any] = {
        "scale": style.scale(values, spread=10),
        "axis": style.axis(values, spread=10),
        "title": "learning rate",
    }
    series = style.Series(entries, legend=False)
    y = alt.Y("optimizer:N", sort=[row["optimizer"] for row in rows], title=None)
    tooltip = [
        alt.Tooltip("optimizer:N"),
        alt.Tooltip("tuned:Q", title="tuned lr", format="~g"),
        alt.Tooltip("low:Q", title="within 5 % from", format="~g"),
        alt.Tooltip("high:Q", title="within 5 % to", format="~g"),
        alt.Tooltip("boundary:Q", title="diverges from", format="~g"),
    ]
    base = alt.Chart().encode(y=y, color=series.color, tooltip=tooltip)
    usable, lost = (
        base.transform_filter("isValid(datum.low)"),
        base.transform_filter("isValid(datum.boundary)"),
    )
    # The number stands to the right of the cross, away from the thick line, unless the chart ends there.
    low, high = min(values), max(values)
    near_end = low * (high / low) ** 0.9 if low > 0 else low + 0.9 * (high - low)
    said = alt.Text("boundary:Q", format="~g")
    at = alt.X("boundary:Q", **place)
    layers = [
        alt.Chart()
        .mark_rule(strokeWidth=2, color=style.NEUTRAL, opacity=0.45)
        .encode(x=alt.X("lowest:Q", **place), x2="highest:Q", y=y),
        usable.mark_rule(strokeWidth=11, strokeCap="round", opacity=0.45).encode(
            x=alt.X("low:Q", **place), x2="high:Q"
        ),
        usable.mark_point(filled=True, size=110, opacity=1).encode(x=alt.X("tuned:Q", **place)),
        lost.mark_text(text="✕", fontSize=15, fontWeight="bold").encode(x=at),
        lost.transform_filter(f"datum.boundary <= {near_end}")
        .mark_text(align="left", dx=11, fontSize=11)
        .encode(x=at, text=said),
        lost.transform_filter(f"datum.boundary > {near_end}")
        .mark_text(align="right", dx=-11, fontSize=11)
        .encode(x=at, text=said),
    ]
    description = (
        "Grey: the learning rates that were searched. Thick: those within 5 % of the tuned one, none of them "
        "diverging. Dot: the tuned one. Cross and number: the lowest one at which some seed diverged."
    )
    findings = tuple(
        f"{row['optimizer']}: within 5 % from {row['low']:.4g} to {row['high']:.4g}, "
        f"{row['decades']:.1f} decades; "
        + (f"some seed diverged from {row['boundary']:.4g} on." if row["boundary"] else "no seed diverged.")
        if row["low"] is not None
        else f"{row['optimizer']}: diverged on some or all reporting seeds even where it is tuned."
        for row in rows
    )
    spec = series.specification(layers, {"rows": rows}, description, height=36 * len(rows))
    return Chart("room", "Room for the learning rate", description, findings, spec)


def _seeds_chart(result: Result, entries: Sequence[Entry]) -> Chart | None:
    import altair as alt

    metric = result.ranking.metric
    rows = curves.final_metrics(result, entries)
    if not rows:
        return None
    labels = list(dict.fromkeys(row["optimizer"] for row in rows))
    series = style.Series(entries, legend=False)
    ends = [{"mean": row["metric"], "low": row["metric"], "high": row["metric"]} for row in rows]
    scale, axis, cut = style.metric_scale(ends, result.ranking.higher_is_better, least=0.05)
    base = alt.Chart().encode(y=alt.Y("optimizer:N", sort=labels, title=None), color=series.color)
    layers = [
        base.mark_point(clip=True, filled=True, size=60, opacity=0.55).encode(
            x=alt.X("metric:Q", title=metric, scale=scale, axis=axis),
            tooltip=[
                alt.Tooltip("optimizer:N"),
                alt.Tooltip("seed:Q"),
                alt.Tooltip("metric:Q", title=metric, format=".4~g"),
            ],
        ),
        base.mark_tick(clip=True, thickness=3, size=24).encode(
            x=alt.X("mean(metric):Q", title=metric, scale=scale, axis=axis)
        ),
    ]
    description = f"Final validation {metric} of every seed that finished. Bars: means.{cut}"
    scores = {label: [row["metric"] for row in rows if row["optimizer"] == label] for label in labels}
    findings = tuple(
        f"{label}: {len(own)} seeds from {number(min(own))} to {number(max(own))}." for label, own in scores.items()
    )
    spec = series.specification(layers, {"rows": rows}, description, height=38 * len(labels))
    return Chart("seeds", f"{_capital(metric)} of every seed", description, findings, spec)


def _loss_chart(
    result: Result, entries: Sequence[Entry], members: Sequence[Entry], name: str, which: str
) -> Chart | None:
    rows, block = curves.training_loss(result, members)
    if not rows:
        return None
    each = "each point is one mini-batch" if block == 1 else f"each point is the mean of {block} records"
    described = f"Training loss{which} of the tuned configurations; {each}."
    ends = [row[end] for row in rows for end in ("low", "high")]
    looks = style.scale(ends, spread=1), style.axis(ends, spread=1)
    return _curve_chart(entries, rows, (name, f"Training loss{which}", "training loss"), described, looks)


def _metric_chart(result: Result, entries: Sequence[Entry]) -> Chart | None:
    rows = curves.validation_metric(result, entries)
    if len({row["step"] for row in rows}) < 2:
        return None
    metric = result.ranking.metric
    scale, axis, cut = style.metric_scale(rows, result.ranking.higher_is_better)
    described = f"Validation {metric} of the tuned configurations.{cut}"
    names = "validation-metric", f"{_capital(metric)} during training", metric
    return _curve_chart(entries, rows, names, described, (scale, axis))


def _curve_chart(
    entries: Sequence[Entry],
    rows: list[Row],
    names: tuple[str, str, str],
    described: str,
    looks: tuple[Any, Any],
) -> Chart:
    """A chart of curves over the steps; names: its id, its title and the title of its vertical axis."""
    import altair as alt

    series = style.Series(entries)
    name, title, vertical = names
    scale, axis = looks
    x = alt.X(
        "step:Q",
        title="step",
        scale=alt.Scale(nice=False),
        axis=alt.Axis(grid=False, format=",d", tickCount=6),
    )
    y = alt.Y("mean:Q", title=vertical, scale=scale, axis=axis)
    base = alt.Chart().encode(x=x, color=series.color)
    layers = [
        base.mark_area(clip=True).encode(
            y=alt.Y("low:Q", title=vertical, scale=scale, axis=axis),
            y2="high:Q",
            opacity=series.opacity(0.14),
        ),
        base.mark_line(clip=True, strokeWidth=1.8).encode(y=y, opacity=series.opacity()),
        # Points that nobody sees, wide enough to be hit by a mouse or a thumb, carry the tooltips.
        base.mark_point(clip=True, filled=True, size=90, opacity=0).encode(
            y=y,
            tooltip=[
                alt.Tooltip("optimizer:N"),
                alt.Tooltip("step:Q", format=","),
                alt.Tooltip("mean:Q", title="mean over seeds", format=".4~g"),
                *_range_tooltips(),
            ],
        ),
    ]
    description = f"{described} Lines: mean over all seeds; bands: lowest to highest seed."
    findings = []
    for label in dict.fromkeys(row["optimizer"] for row in rows):
        own = [row for row in rows if row["optimizer"] == label]
        findings.append(
            f"{label}: from {number(own[0]['mean'])} at step {own[0]['step']:,.0f} "
            f"to {number(own[-1]['mean'])} at step {own[-1]['step']:,.0f}."
        )
    spec = series.specification(layers, {"rows": rows}, description)
    return Chart(name, title, description, tuple(findings), spec)


def _range_tooltips() -> list[Any]:
    import altair as alt

    return [
        alt.Tooltip("low:Q", title="lowest seed", format=".4~g"),
        alt.Tooltip("high:Q", title="highest seed", format=".4~g"),
    ]


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
