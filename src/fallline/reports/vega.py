"""What draws the charts: Vega-Lite as one script, and still pictures for readers without scripts.

Both come out of vl-convert, which holds the JavaScript libraries, so nothing is ever downloaded. Bundling
them takes
seconds and gives the same text every time: it is done once per version and user, beside everything else, and
kept.
"""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

STILL_WIDTH = 920
"""The width, in points, of the still pictures."""

SNIPPET = "window.vegaEmbed = vegaEmbed;"
"""All that the page needs of the libraries; the bundle brings what it depends on."""

BUNDLE = f"import sys, vl_convert; sys.stdout.buffer.write(vl_convert.javascript_bundle({SNIPPET!r}).encode())"


@contextlib.contextmanager
def bundling() -> Iterator[Callable[[], str]]:
    """Begin to make the script; what is given, called inside the block, waits for it and returns it.

    The bundling holds Python's global lock, so it runs in a process of its own while the caller goes on.
    """
    kept = cache_file()
    if kept is not None and kept.exists():
        yield lambda: kept.read_text(encoding="utf-8")
        return
    try:
        process = subprocess.Popen(
            [sys.executable, "-c", BUNDLE],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
    except OSError:
        yield lambda: _keep(_bundle(), kept)
        return
    with process:

        def wait() -> str:
            made, _ = process.communicate()
            return _keep(made.decode() if process.returncode == 0 else _bundle(), kept)

        try:
            yield wait
        finally:
            if process.poll() is None:  # whoever asked for the script failed before taking it
                process.kill()


def _bundle() -> str:
    import vl_convert

    return vl_convert.javascript_bundle(SNIPPET)


def cache_file() -> Path | None:
    """Where the script is kept: in the system's folder for what can be made again, if it has one."""
    name = f"vega-{metadata.version('vl-convert-python')}.js"
    try:
        if sys.platform == "win32":
            base = os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local"
        elif sys.platform == "darwin":
            base = Path.home() / "Library" / "Caches"
        else:
            base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError:  # a user without a home
        return None
    return Path(base) / "fallline" / name


def _keep(text: str, path: Path | None) -> str:
    """Keep a text for the next time, whole or not at all; where that fails it costs time, no more."""
    if path is None:
        return text
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".part")
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        Path(temporary).replace(path)
    return text


def still(name: str, spec: Mapping[str, Any], theme: Mapping[str, Any]) -> str:
    """A chart as an SVG picture, without what only a mouse can find; equal charts give equal pictures.

    Args:
        name: of the chart in its page; the ids inside the picture begin with it.
        spec: a layered Vega-Lite specification.
        theme: a Vega-Lite configuration.
    """
    import vl_convert

    seen = [layer for layer in spec["layer"] if layer["mark"].get("opacity") != 0]
    picture = vl_convert.vegalite_to_svg({**spec, "layer": seen, "width": STILL_WIDTH}, config=dict(theme))
    # Vega numbers its clipping paths through all the pictures of a process.
    numbers = list(dict.fromkeys(re.findall(r'id="clip(\d+)"', picture)))
    return re.sub(
        r"\bclip(\d+)\b",
        lambda found: f"{name}-clip{numbers.index(found[1])}" if found[1] in numbers else found[0],
        picture,
    )
