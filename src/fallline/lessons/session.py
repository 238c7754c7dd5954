"""A learner's session with a page: one kernel, the cells that wait for it, and everybody who looks on.

What runs, what it prints and what becomes of the kernel is told as events to every tab that shows the page.
"""

from __future__ import annotations

import ast
import asyncio
import contextlib
import signal
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from queue import Empty
from typing import Any

from fallline.lessons.outputs import of_message

Event = dict[str, Any]

LARGEST_TEXT = 100_000
MOST_OUTPUTS = 200
MOST_WAITING = 100
KILL = getattr(signal, "SIGKILL", signal.SIGTERM)
MOST_TABS = 20
# A tab that cannot follow so many events is dropped; its browser asks again, and gets what there is by then.
MOST_BEHIND = 2000
SECONDS_TO_STOP = 4.0
SECONDS_WITHOUT_TABS = 60.0
SECONDS_BETWEEN_LOOKS = 0.5
SECONDS_BETWEEN_SIGNS = 15.0
SECONDS_TO_START = 60.0
WARM = "import torch, matplotlib.pyplot"


@dataclass
class Ran:
    """A cell that was run, is running or waits to be.

    Attributes:
        state: "queued", "running", "done", "failed", "stopped" or "skipped".
        text: characters of its outputs so far.
        dropped: characters that were not kept.
    """

    name: str
    code: str
    state: str = "queued"
    seconds: float = 0.0
    outputs: list[Event] = field(default_factory=list)
    text: int = 0
    dropped: int = 0

    @property
    def shown(self) -> Event:
        return {
            "cell": self.name,
            "state": self.state,
            "seconds": self.seconds,
            "outputs": self.outputs,
            "dropped": self.dropped,
        }


class KernelDied(Exception):
    """The kernel's process ended while it was needed."""


class Session:
    """One page's kernel.

    Args:
        name: of the page.
        folder: for the sockets of kernels.
        memory: bytes that a kernel may take.
    """

    def __init__(self, name: str, folder: Path, memory: int) -> None:
        self.name = name
        self.folder = folder
        self.memory = memory
        self.state = "ended"
        self.cells: dict[str, Ran] = {}
        self.waiting: list[Ran] = []
        self.running: Ran | None = None
        self._tabs: set[asyncio.Queue[Event | None]] = set()
        self._kernel: Any = None
        self._client: Any = None
        self._count = 0
        self._why = ""  # of a death that was asked for
        self._turn = asyncio.Lock()  # one request to the kernel at a time
        self._wake = asyncio.Event()
        self._worker: asyncio.Task[None] | None = None
        self._end: asyncio.Task[None] | None = None
        self._stopping: asyncio.Task[None] | None = None
        self._move: asyncio.Task[None] | None = None
        self._paused = asyncio.Event()

    # Tabs.

    async def events(self) -> AsyncGenerator[Event | None]:
        """Everything that happens from now on, after what there is already; None is nothing, now and then."""
        queue: asyncio.Queue[Event | None] = asyncio.Queue(MOST_BEHIND)
        self._tabs.add(queue)
        if self._end is not None:
            self._end.cancel()
            self._end = None
        self.begin()
        try:
            yield {
                "type": "hello",
                "kernel": self.state,
                "cells": [ran.shown for ran in self.cells.values()],
            }
            while True:
                try:  # not wait_for, which in Python 3.11 can lose the news that a tab is gone
                    async with asyncio.timeout(SECONDS_BETWEEN_SIGNS):
                        event = await queue.get()
                except TimeoutError:
                    yield None
                    continue
                if event is None:
                    return
                yield event
        finally:
            self._tabs.discard(queue)
            if not self._tabs and self.state != "closed":
                self._end = asyncio.create_task(self._end_soon())

    @property
    def full(self) -> bool:
        """Whether it has as many tabs as one learner can look at."""
        return len(self._tabs) >= MOST_TABS

    def tell(self, kind: str, **fields: Any) -> None:
        """Sends an event to every tab."""
        for queue in list(self._tabs):
            try:
                queue.put_nowait({"type": kind, **fields})
            except asyncio.QueueFull:
                self._tabs.discard(queue)
                queue.get_nowait()
                queue.put_nowait(None)

    def notice(self, text: str) -> None:
        """Says something to the learner."""
        self.tell("notice", text=text)

    async def _end_soon(self) -> None:
        await asyncio.sleep(SECONDS_WITHOUT_TABS)
        self._end = None
        await self.close()
        self.state = "ended"

    # What a learner asks for.

    def begin(self) -> None:
        """Starts the kernel if there is none, and the worker that feeds it."""
        if self._worker is None:
            self._worker = asyncio.create_task(self._work())

    def run(self, cells: Sequence[Mapping[str, str]]) -> None:
        """Queues cells; each starts when those before it have ended well.

        Raises:
            ValueError: when too many wait already.
        """
        if len(self.waiting) + len(cells) > MOST_WAITING:
            raise ValueError(f"{len(self.waiting)} cells wait already")
        for given in cells:
            if any(ran.name == given["cell"] for ran in self.waiting):
                continue
            ran = Ran(given["cell"], given["code"])
            self.waiting.append(ran)
            self.tell("cell", cell=ran.name, state="queued")
        self.begin()
        self._wake.set()

    async def stop(self) -> None:
        """Interrupts what runs, and forgets what waits; a kernel that does not obey is started anew."""
        self.skip()
        self.stop_move()
        if self.running is None or self._kernel is None:
            return
        self.running.state = "stopped"
        with contextlib.suppress(Exception):
            await self._kernel.interrupt_kernel()
        if self._stopping is None or self._stopping.done():
            self._stopping = asyncio.create_task(self._insist(self.running))

    async def restart(self, why: str) -> None:
        """Starts the kernel anew; its variables are gone."""
        self.skip()
        self.stop_move()
        if self.running is not None:
            self.running.state = "stopped"
        self._why = why
        if self._kernel is not None:
            with contextlib.suppress(Exception):
                await self._kernel.signal_kernel(KILL)
        self._wake.set()  # the worker finds it dead

    def skip(self) -> None:
        """Forgets the cells that wait."""
        for ran in self.waiting:
            ran.state = "skipped"
            self.tell("cell", cell=ran.name, state="skipped")
        self.waiting.clear()

    async def close(self) -> None:
        """Ends the kernel and everything around it."""
        self.state = "closed"
        for task in (self._worker, self._stopping, self._move, self._end):
            if task is not None and task is not asyncio.current_task():
                await _cancelled(task)
        self._worker = self._stopping = self._move = None
        kernel, self._kernel = self._kernel, None
        if kernel is not None:
            await self._ended(kernel)
        self.cells.clear()
        self.waiting.clear()
        self.running = None
        for queue in list(self._tabs):
            with contextlib.suppress(asyncio.QueueFull):
                queue.put_nowait(None)

    # See it move.

    def move(self, settings: Mapping[str, Any], pace: float) -> None:
        """Begins a training run that is shown while it happens; the one before it ends.

        Args:
            pace: epochs in a second.
        """
        self.stop_move()
        self.begin()
        self._paused.clear()
        self._move = asyncio.create_task(self._moving(dict(settings), pace))

    def pause(self, paused: bool) -> None:
        """Holds the run, or lets it go on."""
        (self._paused.set if paused else self._paused.clear)()
        if self._move is not None and not self._move.done():
            self.tell("move", state="paused" if paused else "running")

    def stop_move(self) -> None:
        """Ends the run."""
        if self._move is not None and not self._move.done():
            self._move.cancel()
            self.tell("move", state="stopped")

    async def _moving(self, settings: dict[str, Any], pace: float) -> None:
        try:
            if self._turn.locked():
                self.tell("move", state="waiting")
            began = await self._value("start", settings)
            self.tell("move", state="running", began=True, **began)
            per_turn = max(1, round(pace / 30))
            while True:
                due = time.monotonic() + per_turn / pace
                made = await self._value("advance", per_turn)
                if not self._paused.is_set() or made["done"]:
                    self.tell("move", state="done" if made["done"] else "running", **made)
                else:  # what was on its way when it was paused
                    self.tell("move", state="paused", **made)
                if made["done"]:
                    return
                await asyncio.sleep(max(0.0, due - time.monotonic()))
                while self._paused.is_set():
                    await asyncio.sleep(0.05)
        except KernelDied:
            self.tell("move", state="stopped")

    async def _value(self, function: str, argument: Any) -> dict[str, Any]:
        """What a function of `descent` gives, in the kernel."""
        expression = f"__import__('fallline.lessons.descent', fromlist=['*']).{function}({argument!r})"
        async with self._turn:
            if self._kernel is None:
                await self._ready()
            request = self._client.execute("", silent=True, store_history=False, user_expressions={"it": expression})
            reply = await self._reply(request)
        found = reply["content"]["user_expressions"]["it"]
        if found["status"] != "ok":
            raise KernelDied(found["evalue"])
        return dict(ast.literal_eval(found["data"]["text/plain"]))

    async def _reply(self, request: str) -> Any:
        while True:
            try:
                reply = await self._client.get_shell_msg(timeout=SECONDS_BETWEEN_LOOKS)
            except Empty:
                await self._look()
                continue
            if reply["parent_header"].get("msg_id") == request:
                return reply

    # The worker.

    async def _work(self) -> None:
        while True:
            try:
                async with self._turn:
                    if self._kernel is None:
                        await self._ready()
                while self.waiting:
                    async with self._turn:
                        if self._kernel is None:
                            await self._ready()
                        if self.waiting:
                            await self._run(self.waiting.pop(0))
            except KernelDied as death:
                await self._mourn(death)
                continue
            except Exception as error:  # a defect of ours must not leave a page without its worker
                self.notice(f"Something went wrong here, not in your code: {error!r}.")
                self._say("ready")
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(2 * SECONDS_BETWEEN_LOOKS):
                    await self._wake.wait()
            self._wake.clear()
            if self._kernel is not None and not await self._kernel.is_alive():
                await self._mourn(KernelDied())

    async def _ready(self) -> None:
        """Starts a kernel, and imports what every page needs."""
        from fallline.lessons import kernels  # takes a while, and the first page does not need it

        self._say("starting")
        self._count += 1
        home = self.folder / f"{self.name}-{self._count}"
        home.mkdir()
        kernel = kernels.manager(self.folder, f"k{len(list(self.folder.glob('*.json')))}-{self._count}-{self.name[:8]}")
        self._kernel = kernel
        try:
            await kernels.start(kernel, home, self.memory)
            self._client = kernel.client()
            self._client.start_channels()
            await self._client.wait_for_ready(timeout=SECONDS_TO_START)
        except RuntimeError as error:
            raise KernelDied(str(error)) from error
        self._say("warming")
        await self._reply(self._client.execute(WARM, silent=True, store_history=False))
        self._say("ready")

    async def _run(self, ran: Ran) -> None:
        self.running = ran
        self.cells[ran.name] = ran
        ran.state = "running"
        self._say("busy")
        self.tell("cell", cell=ran.name, state="running")
        began = time.monotonic()
        request = self._client.execute(ran.code, allow_stdin=False, stop_on_error=True)
        try:
            failed = await self._follow(ran, request)
        except Exception:
            ran.state = "stopped" if ran.state == "stopped" else "failed"
            self._finish(ran, began)
            raise
        finally:
            self.running = None
        if ran.state == "running":
            ran.state = "failed" if failed else "done"
        self._finish(ran, began)
        if failed and self.waiting:
            self.skip()
            self.notice("The cells that waited were not run, because the one before them failed.")
        self._say("ready")

    def _finish(self, ran: Ran, began: float) -> None:
        ran.seconds = round(time.monotonic() - began, 3)
        self.tell("cell", cell=ran.name, state=ran.state, seconds=ran.seconds, dropped=ran.dropped)

    async def _follow(self, ran: Ran, request: str) -> bool:
        """Tells what a running cell puts out until the kernel is idle again; says whether it failed."""
        failed, told, replied = False, 0.0, 0.0
        while True:
            try:
                message = await self._client.get_iopub_msg(timeout=SECONDS_BETWEEN_LOOKS)
            except Empty:
                await self._look()
                # In a storm of output the word that the kernel is idle can get lost; its reply does not.
                replied += await self._has_replied(request)
                if replied >= 2:
                    return failed
                continue
            if message["parent_header"].get("msg_id") != request:
                continue
            kind, content = message["msg_type"], message["content"]
            if kind == "status" and content["execution_state"] == "idle":
                return failed
            failed |= kind == "error"
            for output in of_message(kind, content):
                if self._keep(ran, output):
                    self.tell("output", cell=ran.name, output=output)
                elif time.monotonic() - told > 0.25:
                    told = time.monotonic()
                    self.tell("cell", cell=ran.name, state=ran.state, dropped=ran.dropped)

    async def _has_replied(self, request: str) -> bool:
        try:
            reply = await self._client.get_shell_msg(timeout=0.01)
        except Empty:
            return False
        return bool(reply["parent_header"].get("msg_id") == request)

    def _keep(self, ran: Ran, output: Event) -> bool:
        """Keeps an output with its cell as far as there is room; says whether there is something to tell."""
        if output["kind"] == "clear":
            ran.outputs.clear()
            ran.text = 0
            return True
        text = output.get("text")
        if text is not None:
            room = LARGEST_TEXT - ran.text
            if len(text) > room:
                ran.dropped += len(text) - max(0, room)
                output["text"] = text = text[: max(0, room)]
            if not text:
                return False
            ran.text += len(text)
            last = ran.outputs[-1] if ran.outputs else {}
            if last.get("kind") == "text" and last.get("stream") == output.get("stream"):
                last["text"] += text
                output["text"] = text
                return True
        if len(ran.outputs) >= MOST_OUTPUTS and output["kind"] != "error":
            ran.dropped += 1
            return False
        ran.outputs.append(dict(output))
        return True

    async def _look(self) -> None:
        """Looks whether the kernel lives.

        Raises:
            KernelDied: when it does not.
        """
        if self._kernel is None or not await self._kernel.is_alive():
            raise KernelDied

    async def _mourn(self, death: KernelDied) -> None:
        """Says that the kernel died, and lets the worker start another one; not when it was ended on purpose."""
        self.stop_move()
        kernel, self._kernel = self._kernel, None
        if kernel is None:
            return
        self.skip()
        told = f" ({death})" if str(death) else ""
        self.notice(
            self._why
            or f"The kernel died{told}: the code ended its process, or took more memory than there is. It was started "
            "anew; its variables are gone, so run the cells above again."
        )
        self._why = ""
        self._say("restarting")
        await self._ended(kernel)

    async def _insist(self, ran: Ran) -> None:
        await asyncio.sleep(SECONDS_TO_STOP)
        if self.running is ran:
            await self.restart(
                f"The cell did not stop within {SECONDS_TO_STOP:g} seconds, so its kernel was ended and started anew; "
                "its variables are gone."
            )

    async def _ended(self, kernel: Any) -> None:
        if self._client is not None:
            self._client.stop_channels()
            self._client = None
        with contextlib.suppress(Exception):
            await kernel.shutdown_kernel(now=True)

    def _say(self, state: str) -> None:
        self.state = state
        self.tell("kernel", state=state)


async def _cancelled(task: asyncio.Task[None]) -> None:
    """Ends a task; one that waits in somebody else's code can lose the word, so it is asked until it is gone."""
    while not task.done():
        task.cancel()
        await asyncio.wait({task}, timeout=0.5)
