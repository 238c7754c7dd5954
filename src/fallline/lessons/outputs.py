"""What code puts out, as a page shows it: text, errors, figures; from a kernel's messages and from notebooks alike.

Nothing of it is HTML: text is shown as text, and a figure as an image, in which no script runs.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping
from typing import Any

from fallline.lessons.figures import size, themed

Output = dict[str, Any]
"""Its "kind" is "text" (with "stream" and "text"), "error" ("name", "value", "text"), "clear" or "figure" (with
"source", and "width" and "height" in pixels where they are known)."""

LARGEST_FIGURE = 2_000_000
ESCAPES = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b\][^\x07]*\x07")


def of_message(kind: str, content: Mapping[str, Any]) -> list[Output]:
    """A message of a kernel, or an output of a notebook, as what is shown of it.

    Args:
        kind: "stream", "error", "display_data", …; others show nothing.

    >>> of_message("stream", {"name": "stdout", "text": "1\\n"})
    [{'kind': 'text', 'stream': 'stdout', 'text': '1\\n'}]
    """
    if kind == "stream":
        return [_text(content["text"], content["name"])]
    if kind == "error":
        trace = ESCAPES.sub("", "\n".join(content["traceback"]))
        return [{"kind": "error", "name": content["ename"], "value": content["evalue"], "text": trace}]
    if kind == "clear_output":
        return [{"kind": "clear"}]
    if kind in ("display_data", "execute_result", "update_display_data"):
        return [_object(content["data"])]
    return []


def _object(data: Mapping[str, Any]) -> Output:
    for kind in ("image/svg+xml", "image/png"):
        if kind in data:
            return _figure(kind, str(data[kind]))
    return _text(f"{data.get('text/plain', '')}\n", "result")


def _figure(kind: str, content: str) -> Output:
    if len(content) > LARGEST_FIGURE:
        return _text(f"(a figure of {len(content) / 1e6:.1f} MB is not shown)\n", "stderr")
    if kind == "image/png":
        return {"kind": "figure", "source": f"data:{kind};base64,{content.strip()}"}
    encoded = base64.b64encode(themed(content).encode()).decode()
    figure = {"kind": "figure", "source": f"data:{kind};base64,{encoded}"}
    known = size(content)
    return figure if known is None else {**figure, "width": known[0], "height": known[1]}


def _text(text: str, stream: str) -> Output:
    return {"kind": "text", "stream": stream, "text": ESCAPES.sub("", text)}
