"""Starts the course: finds a port, prints the address that opens it, and serves until Ctrl-C."""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import socket
import webbrowser
from collections.abc import Callable
from pathlib import Path

from fallline.errors import InvalidCourse

PORT = 8426
"""Where the course is served, if nobody else is there."""

LARGEST_MEMORY = 4 * 1024**3


def serve(
    *,
    port: int | None = None,
    progress: Path,
    repository: str = "",
    memory: int | None = None,
    browser: bool = True,
    say: Callable[[str], None] = print,
) -> None:
    """Serves the course to this machine until it is interrupted.

    Args:
        port: to listen on; 0 for any, None for `PORT` or any if that is taken.
        progress: the learner's file.
        repository: where the notebooks lie, for links to Colab.
        memory: bytes that a kernel may take; by default half of the machine's, at most 4 GiB.
        browser: whether to open it.
        say: is given what the learner must know, first of all the address.

    Raises:
        InvalidCourse: when the port is taken.
    """
    import uvicorn

    from fallline.lessons.progress import Progress
    from fallline.lessons.server import Course, application

    listener = _listener(port)
    number = listener.getsockname()[1]
    token = secrets.token_urlsafe(24)
    kept = Progress(progress)
    course = Course(kept, memory=memory or default_memory(), repository=repository)
    address = f"http://127.0.0.1:{number}/?token={token}"
    config = uvicorn.Config(
        application(course, port=number, token=token),
        log_level="warning",
        access_log=False,
        server_header=False,
        ws="none",
        timeout_graceful_shutdown=1,
    )
    server = uvicorn.Server(config)

    async def run() -> None:
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        while not server.started and not serving.done():
            await asyncio.sleep(0.01)
        say(f"The course is open at {address}")
        say(f"Progress is kept in {progress}. Press Ctrl-C to end.")
        if browser:
            await asyncio.to_thread(webbrowser.open, address)
        await serving

    # uvicorn shuts down on Ctrl-C, and then passes it on.
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(run())
    say("The course is closed.")


def default_memory() -> int:
    """Half of the machine's memory, at most 4 GiB."""
    with contextlib.suppress(ValueError, OSError, AttributeError):
        return min(LARGEST_MEMORY, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2)
    return LARGEST_MEMORY


def _listener(port: int | None) -> socket.socket:
    for number in (PORT, 0) if port is None else (port,):
        listener = socket.socket()
        # A port whose last connections are fading may be used again at once.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("127.0.0.1", number))
        except (OSError, OverflowError) as error:
            listener.close()
            reason = getattr(error, "strerror", None) or error
            failure = InvalidCourse(f"--port {number} cannot be used: {reason}. Give another, or leave it out.")
            if port is not None:
                raise failure from error
        else:
            return listener
    raise failure
