"""The live course: pages, events and what a learner asks for, on this machine alone.

`security` decides who may talk to it; `session` runs the code; `progress` keeps what was done.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from fallline.lessons import notebooks, site
from fallline.lessons.course import ORDER, Question, lesson
from fallline.lessons.descent import Settings, bound, critical_rate, expected, hessian
from fallline.lessons.progress import Progress
from fallline.lessons.security import Guard
from fallline.lessons.session import Session

LARGEST_CODE = 64 * 1024
MOST_CELLS = 60
FASTEST = 240.0
Handler = Callable[[Request], Awaitable[Response]]


class Course:
    """What the server holds while it runs: a session for every page that is open, and the learner's progress."""

    def __init__(self, progress: Progress, *, memory: int, repository: str = "") -> None:
        self.progress = progress
        self.memory = memory
        self.repository = repository
        self.folder = Path(tempfile.mkdtemp(prefix="fallline-learn-"))
        self.sessions: dict[str, Session] = {}

    def session(self, name: str) -> Session:
        """The session of a page; made when it is first asked for."""
        return self.sessions.setdefault(name, Session(name, self.folder, self.memory))

    async def close(self) -> None:
        """Ends all kernels."""
        await asyncio.gather(*(session.close() for session in self.sessions.values()))
        shutil.rmtree(self.folder, ignore_errors=True)

    # Pages.

    async def index(self, request: Request) -> Response:
        done = {name: self._done(name) for name in ORDER}
        return _page(site.index(live=True, nonce=request.scope["fallline.nonce"], done=done))

    async def page(self, request: Request) -> Response:
        name = request.path_params["page"]
        if name not in ORDER:
            return PlainTextResponse("There is no such page.", 404)
        html = site.page(name, live=True, nonce=request.scope["fallline.nonce"], repository=self.repository)
        return _page(html)

    async def notebook(self, request: Request) -> Response:
        name = request.path_params["page"]
        if name not in ORDER:
            return PlainTextResponse("There is no such notebook.", 404)
        return _file(notebooks.text(name), f"{name}.ipynb", "application/x-ipynb+json")

    def _done(self, name: str) -> str:
        answers = self.progress.page(name).get("answers", {})
        questions = {question.name: question for question in lesson(name).of_kind(Question)}
        right = sum(
            1
            for key, chosen in answers.items()
            if key in questions and _is_right(questions[key], chosen)
        )  # fmt: skip
        return f"{right} of {len(questions)} questions right" if answers else ""

    # Events.

    async def events(self, request: Request) -> Response:
        name = request.path_params["page"]
        if name not in ORDER:
            return PlainTextResponse("There is no such page.", 404)
        if self.session(name).full:
            return PlainTextResponse("The page is open too often: close some of its tabs.", 429)

        async def stream() -> AsyncIterator[str]:
            async with contextlib.aclosing(self.session(name).events()) as events:
                async for event in events:
                    if event is None:
                        yield ": still here\n\n"
                        continue
                    if event["type"] == "hello":
                        event |= {"progress": self.progress.page(name), "complaint": self.progress.complaint}
                    yield f"data: {json.dumps(event)}\n\n"

        headers = {"cache-control": "no-store", "x-accel-buffering": "no"}
        return StreamingResponse(stream(), media_type="text/event-stream", headers=headers)

    # What a learner asks for.

    async def run(self, request: Request) -> Response:
        session, given = await self._asked(request)
        cells = given.get("cells")
        if not isinstance(cells, list) or not 1 <= len(cells) <= MOST_CELLS:
            raise ValueError(f"a request runs 1 to {MOST_CELLS} cells")
        for cell in cells:
            if not isinstance(cell, dict) or not all(isinstance(cell.get(key), str) for key in ("cell", "code")):
                raise ValueError("a cell has a name and code")
            if len(cell["code"]) > LARGEST_CODE or len(cell["cell"]) > 200:
                raise ValueError(f"a cell may have {LARGEST_CODE // 1024} KiB of code")
        session.run(cells)
        return JSONResponse({})

    async def stop(self, request: Request) -> Response:
        session, _ = await self._asked(request)
        await session.stop()
        return JSONResponse({})

    async def restart(self, request: Request) -> Response:
        session, _ = await self._asked(request)
        await session.restart("Python was started anew; its variables are gone.")
        return JSONResponse({})

    async def expect(self, request: Request) -> Response:
        """What is known of a training run before it is made."""
        _, given = await self._asked(request)
        settings = Settings.of(given.get("settings") or {})
        critical = critical_rate(settings)
        told = {"critical": critical, "bound": bound(settings) if critical else "", "text": expected(settings)}
        return JSONResponse({**told, "hessian": hessian()})

    async def move(self, request: Request) -> Response:
        session, given = await self._asked(request)
        action = given.get("action")
        if action == "start":
            settings = given.get("settings") or {}
            Settings.of(settings)
            pace = given.get("pace", 30)
            if not isinstance(pace, int | float) or not 1 <= pace <= FASTEST:
                raise ValueError(f"pace must lie between 1 and {FASTEST:g} epochs a second")
            session.move(settings, pace)
        elif action in ("pause", "resume"):
            session.pause(action == "pause")
        elif action == "stop":
            session.stop_move()
        else:
            raise ValueError("action must be start, pause, resume or stop")
        return JSONResponse({})

    async def note(self, request: Request) -> Response:
        session, given = await self._asked(request)
        tab = given.pop("tab", "")
        self.progress.change(session.name, given)
        session.tell("progress", tab=tab, given=given)
        if self.progress.complaint:
            session.notice(self.progress.complaint)
        return JSONResponse({})

    async def reset(self, request: Request) -> Response:
        session, given = await self._asked(request)
        everything = given.get("everything") is True
        self.progress.reset(None if everything else session.name)
        for name, each in self.sessions.items():
            if everything or name == session.name:
                each.tell("reset")
        return JSONResponse({})

    async def export(self, request: Request) -> Response:
        return _file(self.progress.text(), "fallline-progress.json", "application/json")

    async def _asked(self, request: Request) -> tuple[Session, dict[str, Any]]:
        name = request.path_params["page"]
        if name not in ORDER:
            raise ValueError("there is no such page")
        given = json.loads(await request.body() or b"{}")
        if not isinstance(given, dict):
            raise ValueError("a request is an object")
        return self.session(name), given


def application(course: Course, *, port: int, token: str) -> Guard:
    """The whole server as an ASGI application."""
    asked: dict[str, Handler] = {
        "run": course.run, "stop": course.stop, "restart": course.restart, "expect": course.expect,
        "move": course.move, "progress": course.note, "reset": course.reset,
    }  # fmt: skip
    routes = [
        Route("/", course.index),
        Mount("/assets", StaticFiles(directory=site.ASSETS)),
        Route("/progress.json", course.export),
        Route("/notebooks/{page}.ipynb", course.notebook),
        Route("/events/{page}", course.events),
        *(Route(f"/do/{{page}}/{name}", _mistakes_told(handler), methods=["POST"]) for name, handler in asked.items()),
        Route("/{page}", course.page),
    ]

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        await course.close()

    return Guard(Starlette(routes=routes, lifespan=lifespan), port=port, token=token)


def _mistakes_told(handler: Handler) -> Handler:
    """A handler whose `ValueError` becomes an answer that says what was wrong with the request."""

    async def told(request: Request) -> Response:
        try:
            return await handler(request)
        except (ValueError, RecursionError) as error:
            return JSONResponse({"error": str(error) or "the request cannot be read"}, 400)

    return told


def _is_right(question: Question, chosen: Any) -> bool:
    return isinstance(chosen, int) and 0 <= chosen < len(question.options) and question.options[chosen].right


def _page(html: str) -> Response:
    return HTMLResponse(html, headers={"cache-control": "no-store"})


def _file(text: str, name: str, kind: str) -> Response:
    return Response(text, media_type=kind, headers={"content-disposition": f'attachment; filename="{name}"'})
