"""What draws the charts: Vega, Vega-Lite and vega-embed as one script, and still pictures for readers without
scripts.

Both come out of vl-convert, which holds the JavaScript libraries, so nothing is ever downloaded. Bundling
them takes
seconds and gives the same text every time: it is done once per version and user, beside everything else, and
kept.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

STILL_WIDTH = 920
"""The width, in points, of the still pictures."""

SNIPPET = "window.vegaEmbed = vegaEmbed;"
"""All that the page needs of the libraries; the bundle brings what it depends on."""

BUNDLE = (
    f"import sys, vl_convert; sys.stdout.buffer.write(vl_convert.javascript_bundle({SNIPPET!r}).encode())"
)


def bundle() -> Callable[[], str]:
    """Begin to make the script; call what is returned to have it.

    The bundling holds Python's global lock, so it runs in a process of its own while the caller goes on.
    """
    kept = cache_folder() / f"vega-{metadata.version('vl-convert-python')}.js"
    try:
        text = kept.read_text(encoding="utf-8")
    except OSError:
        pass
    else:
        return lambda: text
    try:
        process = subprocess.Popen(
            [sys.executable, "-c", BUNDLE],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            stdin=subprocess.DEVNULL,
        )
    except OSError:
        return lambda: _kept(vl_convert.javascript_bundle(SNIPPET), kept)

    def wait() -> str:
        made, _ = process.communicate()
        return _kept(
            made.decode() if process.returncode == 0 else vl_convert.javascript_bundle(SNIPPET), kept
        )

    return wait


def cache_folder() -> Path:
    """The folder for what can be made again, by the convention of the system."""
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local"
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "fallline"


def _kept(text: str, path: Path) -> str:
    """Keep a text for the next time, whole or not at all; a folder that cannot be written costs time and
    nothing else."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".part")
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        Path(temporary).replace(path)
    except OSError:
        pass
    return text


def still(spec: Mapping[str, Any], theme: Mapping[str, Any]) -> str:
    """A chart as an SVG picture: its specification drawn once, without what only a mouse can find."""
    import vl_convert

    seen = [layer for layer in spec["layer"] if layer["mark"].get("opacity") != 0]
    return vl_convert.vegalite_to_svg({**spec, "layer": seen, "width": STILL_WIDTH}, config=dict(theme))
