"""How every chart looks: two themes, the scales, and the encodings that the charts of a page share.

`charts` draws with these. Specifications name no colours of optimizers, so that the page can change its
theme.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from fallline.evidence import Entry
from fallline.evidence.sentences import number
from fallline.reports.curves import Row

FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif"

NEUTRAL = "#8a8f98"
"""A grey that is readable on white and on black."""

CUT = 30
"""An outlier this many times farther from the best than the median is gets cut off."""


def _theme(ink: str, faint: str, category: list[str]) -> dict[str, Any]:
    text = {
        "labelColor": ink,
        "titleColor": ink,
        "labelFontSize": 12,
        "titleFontSize": 12,
        "titleFontWeight": "normal",
    }
    return {
        "background": None,
        "font": FONT,
        "view": {"stroke": None},
        "axis": {**text, "gridColor": faint, "domainColor": faint, "tickColor": faint, "labelLimit": 150},
        "legend": {**text, "labelLimit": 260, "symbolStrokeWidth": 2, "symbolSize": 90},
        "text": {"color": ink, "fontSize": 12},
        "range": {"category": category},
    }


LIGHT = "#0072b2 #d55e00 #009e73 #b0559b #8a6d00 #3f9bd6 #555b66 #7a1f1f #5b3fb5 #2f6b2f"
DARK = "#5ab4e8 #ff9551 #3fd0a4 #e79bd3 #f0e05a #8fa8ff #aab2bd #ff8a8a #b9a2ff #9bd67f"

THEMES = {
    # After Okabe and Ito's palette, which colour-blind readers can tell apart; lighter on a dark ground.
    "light": _theme("#3b424c", "#e1e4e8", LIGHT.split()),
    "dark": _theme("#c3cad4", "#30363f", DARK.split()),
}


class Series:
    """The encodings by which an optimizer looks the same in every chart of a page.

    Args:
        entries: all the optimizers of the page, in the order of their colours.
        legend: whether the chart has a legend; a click on it highlights an optimizer.
    """

    def __init__(self, entries: Iterable[Entry], *, legend: bool = True) -> None:
        import altair as alt

        labels = [entry.label for entry in entries]
        self.legend = legend
        self.chosen = alt.selection_point(name="chosen", fields=["optimizer"], bind="legend")
        longest = max((len(label) for label in labels), default=0)
        columns = alt.ExprRef(f"max(1, floor(width / {7 * longest + 40}))")  # 7 pixels a letter, and the symbol
        box = alt.Legend(orient="top", title=None, columns=columns, symbolOpacity=1) if legend else None
        self.color = alt.Color("optimizer:N", scale=alt.Scale(domain=labels), legend=box)
        self.shape = alt.Shape("optimizer:N", scale=alt.Scale(domain=labels), legend=box)

    def opacity(self, full: float = 1.0) -> Any:
        """Full for the optimizers chosen in the legend (all, at first), faint for the others."""
        import altair as alt

        return alt.when(self.chosen).then(alt.value(full)).otherwise(alt.value(full / 10))

    def specification(
        self, layers: Sequence[Any], data: dict[str, list[Row]], description: str, *, height: int = 330
    ) -> dict[str, Any]:
        """A Vega-Lite specification as wide as the page, which holds each of its tables once.

        Args:
            layers: Altair charts, drawn one over the other.
            data: the tables by name; layers that name none read "rows".
            description: what the chart shows, for screen readers.
            height: of the plot, in points.
        """
        import altair as alt

        chart = alt.layer(*layers, data=alt.NamedData("rows")).properties(width="container", height=height)
        if self.legend:
            chart = chart.add_params(self.chosen)
        specification: dict[str, Any] = chart.to_dict(validate=False)
        del specification["config"]  # the theme's place
        return {
            **specification,
            "datasets": data,
            "description": description,
            # resize: a legend that wraps takes its second row from the page, not from its first.
            "autosize": {"type": "fit-x", "contains": "padding", "resize": True},
        }


def scale(values: Iterable[float | None], *, spread: float) -> Any:
    """A logarithmic scale for positive values that span at least the given ratio, else a linear one."""
    import altair as alt

    if is_logarithmic(values := _known(values), spread=spread):
        return alt.Scale(type="log", nice=False, domain=[min(values), max(values)])
    return alt.Scale(zero=False)


def axis(values: Iterable[float | None], *, spread: float, grid: bool = True) -> Any:
    """An axis with readable ticks, on a logarithmic scale too."""
    import altair as alt

    values = _known(values)
    if is_logarithmic(values, spread=spread):
        ticks = logarithmic_ticks(min(values), max(values))
        return alt.Axis(values=ticks, format="~g", grid=grid)
    return alt.Axis(format="~g", grid=grid, tickCount=6)


def is_logarithmic(values: Sequence[float], *, spread: float) -> bool:
    """Whether positive values span at least the given ratio.

    >>> is_logarithmic([0.1, 5.0], spread=10), is_logarithmic([0.0, 5.0], spread=10)
    (True, False)
    """
    return len(values) > 1 and min(values) > 0 and max(values) >= spread * min(values)


def logarithmic_ticks(low: float, high: float) -> list[float]:
    """Ticks at 1, 2 and 5 times powers of ten for up to two decades, beyond at powers of ten, about nine.

    >>> logarithmic_ticks(0.8, 60)
    [1.0, 2.0, 5.0, 10.0, 20.0, 50.0]
    >>> logarithmic_ticks(1e-4, 1.0)
    [0.0001, 0.001, 0.01, 0.1, 1.0]
    """
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    factors = (1, 2, 5) if high <= 100 * low else (1,)
    stride = 1 + (last - first) // 9
    ticks = [float(f"{factor}e{exponent}") for exponent in range(first, last + 1, stride) for factor in factors]
    return [tick for tick in ticks if low * (1 - 1e-9) <= tick <= high * (1 + 1e-9)]


def metric_scale(rows: Sequence[Row], higher_is_better: bool, *, least: float = 0.0) -> tuple[Any, Any, str]:
    """Scale, axis and a note for a metric with "mean", "low" and "high".

    Logarithmic for errors of several magnitudes; else linear, and cut where outliers would flatten the rest. An outlier
    lies `CUT` times farther from the best than the median mean does, and than `least` times the best.
    """
    import altair as alt

    ends = [row["low"] for row in rows] + [row["high"] for row in rows]
    linear = alt.Axis(format="~g", tickCount=6)
    if not higher_is_better and is_logarithmic(ends, spread=20):
        return scale(ends, spread=20), axis(ends, spread=20), ""
    means = sorted(row["mean"] for row in rows)
    best, worst = (max(ends), min(ends)) if higher_is_better else (min(ends), max(ends))
    middle = means[len(means) // 2]
    reach = max(abs((means[-1] if higher_is_better else means[0]) - middle), least * abs(best))
    if reach > 0 and abs(worst - best) > CUT * reach:
        limit = float(f"{best - 6 * reach if higher_is_better else best + 6 * reach:.2g}")
        side = "below" if higher_is_better else "above"
        return (
            alt.Scale(domain=sorted([limit, best]), zero=False),
            linear,
            f" Values {side} {number(limit)} are cut off.",
        )
    return alt.Scale(zero=False), linear, ""


def _known(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None and math.isfinite(value)]
