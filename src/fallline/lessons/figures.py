"""Figures as the kernels draw them: made to fit a light and a dark page, and compared with each other."""

from __future__ import annotations

import re

COLOURS = {
    # As in assets/matplotlibrc: text, axes, grid, then the series; and what they are on a dark page.
    "#3b424c": "#c3cad4",
    "#8a8f98": "#8a8f98",
    "#e1e4e8": "#30363f",
    "#0072b2": "#5ab4e8",
    "#d55e00": "#ff9551",
    "#009e73": "#3fd0a4",
    "#b0559b": "#e79bd3",
    "#8a6d00": "#f0e05a",
    "#3f9bd6": "#8fa8ff",
    "#555b66": "#aab2bd",
    "#ffffff": "#161a20",
}
NUMBER = re.compile(r"-?\d+\.?\d*(?:e-?\d+)?")
SAME_POINTS = 0.05
"""Coordinates that differ by less, in points of 1/72 inch, are the same to the eye."""


def themed(svg: str) -> str:
    """A figure whose colours follow the reader's preference for light or dark; one of another make stays as it is."""
    if "<svg" not in svg or size(svg) is None:
        return svg
    names = {light: f"var(--c{i})" for i, light in enumerate(COLOURS)}
    svg = re.sub(r"#[0-9a-f]{6}\b", lambda found: names.get(found[0], found[0]), svg)
    light = "".join(f"--c{i}:{value};" for i, value in enumerate(COLOURS))
    dark = "".join(f"--c{i}:{value};" for i, value in enumerate(COLOURS.values()))
    style = f"<style>svg{{color-scheme:light dark;{light}}}@media (prefers-color-scheme:dark){{svg{{{dark}}}}}</style>"
    start = svg.index("<svg")
    end = svg.index(">", start) + 1
    return svg[start:end] + style + svg[end:]


def on_white(svg: str) -> str:
    """A figure with a ground of its own, for a notebook, which is light or dark without telling its figures."""
    return svg.replace("<svg ", '<svg style="background: #ffffff" ', 1)


def size(svg: str) -> tuple[int, int] | None:
    """Width and height of a figure that matplotlib drew, in pixels of 1/96 inch; None for others."""
    found = re.search(r'<svg [^>]*?viewBox="0 0 (\d+\.?\d*) (\d+\.?\d*)"', svg, re.DOTALL)
    if found is None:
        return None
    return round(float(found[1]) * 96 / 72), round(float(found[2]) * 96 / 72)


def same_figure(one: str, other: str) -> bool:
    """Whether two figures draw the same, up to the last digits of their coordinates.

    >>> same_figure('<path d="M 1.001 2"/>', '<path d="M 1.002 2"/>')
    True
    >>> same_figure('<path d="M 1 2"/>', '<path d="M 1 3"/>')
    False
    """
    pairs = [_parts(one), _parts(other)]
    return pairs[0][0] == pairs[1][0] and all(
        a == b or abs(float(a) - float(b)) <= SAME_POINTS for a, b in zip(pairs[0][1], pairs[1][1], strict=True)
    )


def _parts(svg: str) -> tuple[list[str], list[str]]:
    """What must be the same: texts, and tags between their numbers; and the numbers of the tags.

    Without the metadata, which say when the figure was made and by which version.
    """
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    # Matplotlib's ids are hashes of coordinates, last digits included: what counts is which one comes where.
    ids = {name: f"i{i}" for i, name in enumerate(re.findall(r'\bid="([^"]+)"', svg))}
    svg = re.sub(r'(\bid="|#)([\w.-]+)', lambda found: found[1] + ids.get(found[2], found[2]), svg)
    tags = "".join(re.findall(r"<[^>]*>", svg))
    return [*re.split(r"<[^>]*>", svg), *NUMBER.split(tags)], NUMBER.findall(tags)
