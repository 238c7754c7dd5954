"""A page's kernel: what it runs, and what becomes of endless loops, storms of output, dead kernels and lost memory."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from fallline.lessons import session as session_module
from fallline.lessons.session import LARGEST_TEXT, Event, Session

MEMORY = 2 * 1024**3
SECONDS = 40


class Tab:
    """A tab that notes every event."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.events: list[Event] = []
        self._stream = session.events()
        self._reader = asyncio.create_task(self._read())

    async def _read(self) -> None:
        async for event in self._stream:
            if event is not None:
                self.events.append(event)

    async def until(self, happened: Callable[[], Any]) -> None:
        """Waits for something, but not for ever."""
        deadline = time.monotonic() + SECONDS
        while not happened():
            assert time.monotonic() < deadline, self.events[-5:]
            await asyncio.sleep(0.01)

    async def ran(self, name: str) -> Event:
        """The event that a cell has ended."""
        ends = {"done", "failed", "stopped", "skipped"}
        await self.until(lambda: any(e.get("cell") == name and e.get("state") in ends for e in self.events))
        return next(e for e in reversed(self.events) if e.get("cell") == name and e.get("state") in ends)

    def text(self, name: str) -> str:
        """What a cell has put out."""
        return "".join(e["output"].get("text", "") for e in self.of("output") if e["cell"] == name)

    def of(self, kind: str) -> list[Event]:
        return [event for event in self.events if event["type"] == kind]

    def notices(self) -> str:
        return " ".join(event["text"] for event in self.of("notice"))

    async def run(self, code: str, name: str = "cell") -> Event:
        """Runs a cell, and gives the event of its end."""
        self.events.clear()
        self.session.run([{"cell": name, "code": code}])
        return await self.ran(name)

    async def leave(self) -> None:
        self._reader.cancel()
        await asyncio.gather(self._reader, return_exceptions=True)
        await self._stream.aclose()


@asynccontextmanager
async def opened(folder: Path) -> AsyncIterator[Tab]:
    session = Session("a-page", folder, MEMORY)
    tab = Tab(session)
    try:
        await tab.until(lambda: session.state == "ready")
        yield tab
    finally:
        await tab.leave()
        await session.close()


@pytest.fixture
def play(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Tab], Awaitable[None]]], None]:
    """Plays a scene with a tab and a kernel, which loads no torch."""
    monkeypatch.setattr(session_module, "WARM", "pass")

    async def whole(scene: Callable[[Tab], Awaitable[None]]) -> None:
        async with opened(tmp_path) as tab:
            await scene(tab)

    return lambda scene: asyncio.run(asyncio.wait_for(whole(scene), 3 * SECONDS))


def kernel_process(tab: Tab) -> psutil.Process:
    return psutil.Process(tab.session._kernel.provisioner.pid)


def test_cells_share_their_variables_and_print_as_they_go(play) -> None:
    async def scene(tab: Tab) -> None:
        assert (await tab.run("x = 20"))["state"] == "done"
        assert (await tab.run("print(x + 1); x * 2"))["state"] == "done"
        assert tab.text("cell") == "21\n40\n"
        tab.events.clear()
        code = "import time\nprint('first', flush=True)\ntime.sleep(1)\nprint('second')"
        tab.session.run([{"cell": "slow", "code": code}])
        await tab.until(lambda: "first" in tab.text("slow"))
        assert "second" not in tab.text("slow"), "it was shown before the cell had ended"
        assert (await tab.ran("slow"))["seconds"] > 0.9

    play(scene)


def test_an_error_shows_its_traceback_and_what_waited_is_not_run(play) -> None:
    async def scene(tab: Tab) -> None:
        tab.session.run([{"cell": "a", "code": "1 / 0"}, {"cell": "b", "code": "print('never')"}])
        assert (await tab.ran("b"))["state"] == "skipped"
        (error,) = [e["output"] for e in tab.of("output")]
        assert (error["kind"], error["name"]) == ("error", "ZeroDivisionError")
        assert "1 / 0" in error["text"]
        assert "\x1b" not in error["text"]
        assert "not run" in tab.notices()
        assert (await tab.run("print('alive')"))["state"] == "done"

    play(scene)


def test_figures_are_images_that_follow_light_and_dark(play) -> None:
    async def scene(tab: Tab) -> None:
        assert (await tab.run("import matplotlib.pyplot as plt\nplt.plot([1, 2])\nplt.show()"))["state"] == "done"
        (figure,) = [e["output"] for e in tab.of("output")]
        assert figure["kind"] == "figure"
        assert figure["source"].startswith("data:image/svg+xml;base64,")
        assert figure["width"] > 100

    play(scene)


def test_input_is_refused_instead_of_waited_for(play) -> None:
    async def scene(tab: Tab) -> None:
        assert (await tab.run("input('name? ')"))["state"] == "failed"
        assert "StdinNotImplementedError" in tab.text("cell")

    play(scene)


def test_an_endless_loop_is_stopped_and_its_variables_stay(play) -> None:
    async def scene(tab: Tab) -> None:
        await tab.run("kept = 7")
        tab.session.run([{"cell": "loop", "code": "while True: pass"}, {"cell": "next", "code": "print(1)"}])
        await tab.until(lambda: any(e.get("state") == "running" and e.get("cell") == "loop" for e in tab.events))
        await asyncio.sleep(0.3)
        began = time.monotonic()
        await tab.session.stop()
        assert (await tab.ran("loop"))["state"] == "stopped"
        assert time.monotonic() - began < 2
        assert (await tab.ran("next"))["state"] == "skipped"
        await tab.run("print(kept)")
        assert tab.text("cell") == "7\n"

    play(scene)


def test_a_loop_that_will_not_stop_loses_its_kernel(play, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session_module, "SECONDS_TO_STOP", 1.0)
    stubborn = "import signal\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\nwhile True: pass"

    async def scene(tab: Tab) -> None:
        tab.session.run([{"cell": "loop", "code": stubborn}])
        await tab.until(lambda: any(e.get("state") == "running" for e in tab.of("cell")))
        await asyncio.sleep(0.5)
        before = kernel_process(tab)
        await tab.session.stop()
        assert (await tab.ran("loop"))["state"] == "stopped"
        assert "did not stop within 1 seconds" in tab.notices()
        assert (await tab.run("print('anew')"))["state"] == "done"
        assert tab.text("cell") == "anew\n"
        assert not before.is_running() or before.status() == psutil.STATUS_ZOMBIE

    play(scene)


def test_a_kernel_that_dies_is_started_anew_and_the_page_says_so(play) -> None:
    async def scene(tab: Tab) -> None:
        await tab.run("x = 1")
        assert (await tab.run("import os; os._exit(3)"))["state"] == "failed"
        await tab.until(lambda: "died" in tab.notices())
        assert (await tab.run("x"))["state"] == "failed", "its variables are gone"
        assert "NameError" in tab.text("cell")

    play(scene)


def test_a_kernel_that_dies_while_nothing_runs_is_started_anew(play) -> None:
    async def scene(tab: Tab) -> None:
        kernel_process(tab).kill()
        await tab.until(lambda: "died" in tab.notices())
        assert (await tab.run("print(1)"))["state"] == "done"

    play(scene)


def test_a_storm_of_output_is_cut_and_stopped(play) -> None:
    async def scene(tab: Tab) -> None:
        ended = await tab.run("print('x' * 99 + '\\n', end='' ) or print(('x' * 99 + '\\n') * 100_000)")
        assert ended["state"] == "done"
        assert len(tab.text("cell")) == LARGEST_TEXT
        assert ended["dropped"] == pytest.approx(10e6, rel=0.02)
        assert sum(len(str(event)) for event in tab.events) < 4 * LARGEST_TEXT
        await tab.run("print('calm')")
        assert tab.text("cell") == "calm\n"
        tab.session.run([{"cell": "storm", "code": "while True: print('y' * 1000)"}])
        await tab.until(lambda: any(e.get("dropped", 0) > 1e6 for e in tab.of("cell")))
        began = time.monotonic()
        await tab.session.stop()
        assert (await tab.ran("storm"))["state"] == "stopped"
        assert time.monotonic() - began < 6

    play(scene)


@pytest.mark.skipif(sys.platform != "linux", reason="memory is bounded on Linux")
def test_code_that_eats_memory_gets_an_error_and_the_machine_stays(play) -> None:
    async def scene(tab: Tab) -> None:
        code = "held = []\nwhile True: held.append(bytearray(64 * 1024**2))"
        assert (await tab.run(code))["state"] == "failed"
        assert "MemoryError" in tab.text("cell")
        assert kernel_process(tab).memory_info().rss < MEMORY
        assert (await tab.run("held.clear(); print('alive')"))["state"] == "done"

    play(scene)


def test_two_tabs_see_the_same_and_a_new_one_sees_what_there_was(play) -> None:
    async def scene(tab: Tab) -> None:
        second = Tab(tab.session)
        await tab.run("print('seen')")
        await second.until(lambda: "seen" in second.text("cell"))
        third = Tab(tab.session)
        await third.until(lambda: third.events)
        (cell,) = third.events[0]["cells"]
        assert (third.events[0]["type"], cell["state"]) == ("hello", "done")
        assert cell["outputs"] == [{"kind": "text", "stream": "stdout", "text": "seen\n"}]
        for other in (second, third):
            await other.leave()
        assert (await tab.run("print(2)"))["state"] == "done"

    play(scene)


def test_the_kernel_ends_when_the_last_tab_is_closed_and_not_before(play, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session_module, "SECONDS_WITHOUT_TABS", 0.5)

    async def scene(tab: Tab) -> None:
        process = kernel_process(tab)
        tab.session.run([{"cell": "loop", "code": "while True: pass"}])
        await tab.leave()
        again = Tab(tab.session)  # as when a page is loaded again
        await asyncio.sleep(1)
        assert process.is_running()
        await again.leave()
        await again.until(lambda: not process.is_running() or process.status() == psutil.STATUS_ZOMBIE)
        await again.until(lambda: tab.session.state == "ended")
        back = Tab(tab.session)
        await back.until(lambda: tab.session.state == "ready")
        assert back.events[0]["cells"] == []
        await back.leave()

    play(scene)


def test_a_run_moves_pauses_and_goes_on_beside_the_cells(play) -> None:
    async def scene(tab: Tab) -> None:
        tab.session.move({"lr": 0.05, "epochs": 300}, 60)
        await tab.until(lambda: any(e.get("points") for e in tab.of("move")[1:]))
        tab.session.pause(True)
        await tab.until(lambda: tab.of("move")[-1]["state"] == "paused")
        await asyncio.sleep(0.3)
        seen = len(tab.of("move"))
        await asyncio.sleep(0.5)
        assert len(tab.of("move")) == seen, "it went on while it was paused"
        moves = tab.of("move")
        assert (await tab.run("print('between')"))["state"] == "done"
        tab.session.pause(False)
        await tab.until(lambda: any(e["state"] == "done" for e in tab.of("move")))
        points = [point for event in [*moves, *tab.of("move")] for point in event.get("points", [])]
        assert [point[0] for point in points] == list(range(301)), "every epoch once, in order"
        assert tab.of("move")[-1]["outcome"]["kind"] == "arrived"

    play(scene)


def test_a_run_that_diverges_says_why(play) -> None:
    async def scene(tab: Tab) -> None:
        tab.session.move({"lr": 0.5, "epochs": 400}, 240)
        await tab.until(lambda: tab.of("move") and tab.of("move")[-1]["state"] == "done")
        text = tab.of("move")[-1]["outcome"]["text"]
        assert "lr 0.5 is above 2/λmax = 0.1803: expected" in text
        assert "nan" not in text.lower().split()

    play(scene)


def test_too_many_cells_are_refused(play) -> None:
    async def scene(tab: Tab) -> None:
        with pytest.raises(ValueError, match="wait already"):
            tab.session.run([{"cell": str(i), "code": "1"} for i in range(session_module.MOST_WAITING + 1)])

    play(scene)
