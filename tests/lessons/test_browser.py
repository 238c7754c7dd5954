"""The live course in a real browser: read, run, changed, stopped, answered, and come back to."""

from __future__ import annotations

import json
import re
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from tests.lessons.conftest import Served

from fallline.lessons import course as course_module
from fallline.lessons.course import ORDER, Code, Question

axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe-core is not installed")
expect = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed").expect

FIRST = ORDER[0]
SECONDS = 60_000
Opened = Callable[..., Any]


@pytest.fixture
def open_page(chromium: Any, course: Served) -> Iterator[Opened]:
    """Opens a page of the course in a new browser; every error of its scripts fails the test."""
    contexts, errors = [], []

    def opened(path: str = "", *, at: Served = course, ready: bool = True, **look: Any) -> Any:
        context = chromium.new_context(**{"viewport": {"width": 1280, "height": 900}, **look})
        contexts.append(context)
        context.set_default_timeout(SECONDS)
        page = context.new_page()
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda message: errors.append(message.text) if is_error(message) else None)
        page.on("dialog", lambda dialog: dialog.accept())
        page.goto(at.address)
        if path:
            page.goto(at.home + path)
            if ready:
                expect(page.locator(".kernel")).to_have_attribute("data-state", "ready", timeout=SECONDS)
        return page

    yield opened
    for context in contexts:
        context.close()
    assert not errors


def is_error(message: Any) -> bool:
    """An error of a page, and not the browser's own word of a refused request, which the learner is told of, or of the
    style that Chromium's editing would like to keep for text typed over coloured text.
    """
    expected = ("status of 400", "Applying inline style")
    return message.type == "error" and not any(words in message.text for words in expected)


def cell(page: Any, title: str) -> Any:
    return page.locator(f"#{course_module.slug(title)}")


def type_code(page: Any, title: str, code: str) -> None:
    """Types into a cell's editor, by the keyboard alone."""
    cell(page, title).locator(".cm-content").focus()
    page.keyboard.press("Control+a")
    page.keyboard.type(code)


def run(page: Any, title: str, state: str = "done") -> str:
    """Runs a cell by the keyboard, and gives what it shows."""
    cell(page, title).locator(".cm-content").focus()
    page.keyboard.press("Control+Enter")
    expect(cell(page, title)).to_have_attribute("data-state", state, timeout=SECONDS)
    return str(cell(page, title).locator(".outputs").inner_text())


@pytest.mark.parametrize("name", ORDER)
def test_every_cell_of_every_page_runs_and_prints_what_was_recorded(open_page: Opened, name: str):
    page = open_page(name)
    codes = list(course_module.lesson(name).of_kind(Code))
    recorded = {code.name: page.locator(f"#{code.name} .outputs pre").all_inner_texts() for code in codes}
    assert any(recorded.values())
    page.locator(".menu summary").click()
    page.locator("#run-all").click()
    for code in codes:
        expect(page.locator(f"#{code.name}")).to_have_attribute("data-state", "done", timeout=2 * SECONDS)
        assert page.locator(f"#{code.name} .outputs pre").all_inner_texts() == recorded[code.name]
        figures = sum("image/svg+xml" in output.get("data", {}) for output in code.outputs)
        assert page.locator(f"#{code.name} .outputs img").count() == figures


def test_code_is_edited_run_kept_and_reset(open_page: Opened):
    page = open_page(FIRST)
    title = "The loss before training"
    original = cell(page, title).locator(".cm-content").inner_text()
    expect(cell(page, title).locator(".reset")).to_be_hidden()
    type_code(page, title, "print(6 * 7)")
    assert run(page, title).strip() == "42"
    page.reload()
    expect(cell(page, title).locator(".cm-content")).to_have_text("print(6 * 7)")
    cell(page, title).locator(".reset").click()
    assert cell(page, title).locator(".cm-content").inner_text() == original
    expect(cell(page, title).locator(".reset")).to_be_hidden()


def test_a_cell_that_needs_those_above_runs_them(open_page: Opened):
    page = open_page("how-far-is-too-far")
    page.locator(".menu summary").click()
    page.locator("#restart").click()
    expect(page.locator("#notices")).to_contain_text("Python was started anew")
    expect(page.locator(".kernel")).to_have_attribute("data-state", "ready", timeout=SECONDS)
    assert "NameError" in run(page, "The largest eigenvalue", "failed")
    cell(page, "The largest eigenvalue").locator(".run-above").click()
    expect(cell(page, "Walking on the surface")).to_have_attribute("data-state", "done", timeout=SECONDS)
    assert "0.1803" in run(page, "The largest eigenvalue")


def test_an_endless_loop_is_stopped(open_page: Opened):
    page = open_page(FIRST)
    type_code(page, "Mean squared error", "while True: pass")
    page.keyboard.press("Control+Enter")
    expect(page.locator("#kernel-text")).to_have_text("Running …")
    page.locator("#stop").click()
    expect(cell(page, "Mean squared error")).to_have_attribute("data-state", "stopped", timeout=SECONDS)
    cell(page, "Mean squared error").locator(".reset").click()
    assert "1.1666" in run(page, "Mean squared error")


def test_a_dead_kernel_and_a_storm_of_output_leave_the_page_usable(open_page: Opened):
    page = open_page(FIRST)
    type_code(page, "Mean squared error", "print(('x' * 99 + '\\n') * 100_000)")
    assert "9.9 MB more, which are not shown" in run(page, "Mean squared error")
    type_code(page, "Mean squared error", "import os; os._exit(1)")
    run(page, "Mean squared error", "failed")
    expect(page.locator("#notices")).to_contain_text("The kernel died")
    page.locator("#notices button").first.click()
    expect(page.locator(".kernel")).to_have_attribute("data-state", "ready", timeout=SECONDS)
    type_code(page, "Mean squared error", "print('alive')")
    assert run(page, "Mean squared error").strip() == "alive"
    cell(page, "Mean squared error").locator(".reset").click()


def test_two_tabs_show_the_same(open_page: Opened, chromium: Any):
    page = open_page(FIRST)
    second = page.context.new_page()
    second.goto(page.url)
    expect(second.locator(".kernel")).to_have_attribute("data-state", "ready", timeout=SECONDS)
    type_code(page, "Cross-entropy", "print('from the first')")
    run(page, "Cross-entropy")
    expect(cell(second, "Cross-entropy").locator(".outputs")).to_have_text("from the first\n")
    expect(cell(second, "Cross-entropy").locator(".cm-content")).to_have_text("print('from the first')")
    second.close()
    assert run(page, "Cross-entropy").strip() == "from the first"
    cell(page, "Cross-entropy").locator(".reset").click()


def move(page: Any, guess: str, **settings: str) -> str:
    """Guesses, trains, and gives what is said when it is over."""
    for name, value in settings.items():
        field = page.locator(f".move [name={name}]")
        if name in ("optimizer", "batch", "pace"):
            field.select_option(value)
        else:
            field.fill(value)
            field.press("Enter")
    page.locator(f'.move input[value="{guess}"]').check()
    page.get_by_role("button", name=re.compile("^Train")).click()
    expect(page.locator(".move .told")).to_contain_text("You guessed", timeout=SECONDS)
    return str(page.locator(".move .told").inner_text())


def test_divergence_is_called_what_it_is(open_page: Opened):
    page = open_page("how-far-is-too-far")
    expect(page.locator(".move .critical")).to_contain_text("2/λmax = 0.1803")
    train = page.get_by_role("button", name=re.compile("^Train"))
    expect(train).to_be_disabled()
    told = move(page, "diverged", pace="120")
    assert "lr 0.19 is above 2/λmax = 0.1803: expected" in told
    assert "You guessed that." in told
    assert "nan" not in page.locator(".move").inner_text().lower()
    told = move(page, "diverged", lr="0.1", epochs="300")
    assert "Arrived" in told
    assert "You guessed: it diverges." in told
    assert "lr=0.1" in page.url
    told = move(page, "arrived", momentum="0.9", lr="0.35")
    assert "above 2(1 + β)/λmax = 0.3426" in told


def test_the_address_carries_the_settings(open_page: Opened):
    page = open_page(f"{FIRST}?optimizer=adam&lr=0.3&epochs=150&weight=1.5")
    for name, value in {"optimizer": "adam", "lr": "0.3", "epochs": "150", "weight": "1.5"}.items():
        expect(page.locator(f".move [name={name}]")).to_have_value(value)
    expect(page.locator(".move [name=momentum]")).to_be_disabled()
    assert "Arrived" in move(page, "arrived", pace="120")


def test_the_start_is_dragged_and_moved_by_keys_and_a_run_pauses(open_page: Opened):
    page = open_page(FIRST)
    handle = page.locator(".move .start")
    handle.scroll_into_view_if_needed()
    box = handle.bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.mouse.down()
    page.mouse.move(box["x"] + 60, box["y"] - 40, steps=4)
    page.mouse.up()
    weight = float(page.locator(".move [name=weight]").input_value())
    assert weight > 0.8
    handle.focus()
    page.keyboard.press("ArrowRight")
    expect(page.locator(".move [name=weight]")).to_have_value(f"{weight + 0.1:.4g}")
    page.locator(".move [name=epochs]").fill("2000")
    page.locator(".move [name=epochs]").press("Enter")
    page.locator('.move input[value="on the way"]').check()
    page.get_by_role("button", name="Train", exact=True).click()
    page.get_by_role("button", name="Pause").click()
    expect(page.get_by_role("button", name="Go on")).to_be_enabled()
    page.wait_for_timeout(300)
    held = page.locator(".move .here").inner_text()
    page.wait_for_timeout(500)
    assert page.locator(".move .here").inner_text() == held
    page.get_by_role("button", name="Go on").click()
    expect(page.locator(".move .here")).not_to_have_text(held)
    page.locator(".move").get_by_role("button", name="Stop").click()
    expect(page.locator(".move .told")).to_contain_text("Stopped after epoch")
    way = page.locator(".move .path").get_attribute("d")
    assert way.count("L") > 3


def test_a_wrong_setting_is_named(open_page: Opened):
    page = open_page(FIRST)
    page.locator(".move [name=lr]").fill("-1")
    page.locator(".move [name=lr]").press("Enter")
    expect(page.locator(".move .problem")).to_contain_text("lr = -1 must lie between")
    page.locator('.move input[value="arrived"]').check()
    expect(page.get_by_role("button", name="Train", exact=True)).to_be_disabled()


def test_answers_say_why_and_are_there_after_a_reload(open_page: Opened):
    page = open_page(FIRST)
    question = next(q for q in course_module.lesson(FIRST).of_kind(Question) if q.name == "adaptive")
    for position, option in enumerate(question.options):
        place = page.locator(f"#adaptive-{position}")
        place.check()
        reason = page.locator(f"#adaptive-{position}-reason")
        expect(reason).to_be_visible()
        expect(reason).to_contain_text("Right." if option.right else "Not this one.")
        expect(page.locator("#question-adaptive .spoken")).to_contain_text("Right." if option.right else "Not this")
    page.locator("#adaptive-2").check()
    expect(page.locator("#score")).to_contain_text("1 of")
    page.wait_for_timeout(300)
    page.reload()
    expect(page.locator("#adaptive-2")).to_be_checked()
    expect(page.locator("#adaptive-2-reason")).to_be_visible()
    expect(page.locator("#adaptive-1-reason")).to_be_hidden()


def test_progress_is_exported_shown_on_the_contents_and_reset(open_page: Opened, serve: Callable[..., Served]):
    own = serve("--learner", "ada")
    page = open_page(FIRST, at=own)
    page.locator("#purpose-1").check()
    page.locator("#gradient-descent").scroll_into_view_if_needed()
    page.wait_for_timeout(2200)
    with page.expect_download() as waiting:
        page.locator(".menu summary").click()
        page.get_by_text("Export my progress").click()
    exported = json.loads(waiting.value.path().read_text())
    assert exported["pages"][FIRST]["answers"] == {"purpose": 1}
    assert exported == json.loads((own.data / "fallline" / "learn" / "ada.json").read_text())
    assert exported["pages"][FIRST]["place"]
    page.goto(own.home)
    expect(page.locator(".parts .done").first).to_contain_text("1 of")
    page.goto(own.home + FIRST)
    expect(page.locator("#resume")).to_contain_text("You were here")
    page.locator(".menu summary").click()
    page.locator("#reset-page").click()
    expect(page.locator("#purpose-1")).not_to_be_checked()
    assert json.loads((own.data / "fallline" / "learn" / "ada.json").read_text())["pages"] == {}


def test_previous_and_next_lead_through_all_the_pages(open_page: Opened):
    page = open_page()
    page.locator(".parts a").first.click()
    for name in ORDER:
        expect(page).to_have_title(re.compile(re.escape(course_module.lesson(name).header.title)))
        page.locator(".onward .next").click()
    expect(page.locator(".parts")).to_be_visible()
    page.goto(page.url + ORDER[-1])
    for name in reversed(ORDER[:-1]):
        page.locator(".onward .previous").click()
        expect(page).to_have_title(re.compile(re.escape(course_module.lesson(name).header.title)))


def test_the_notebook_is_downloaded_or_opened_in_colab(open_page: Opened, serve: Callable[..., Served]):
    page = open_page(FIRST)
    with page.expect_download() as waiting:
        page.locator(".onward .interactive").click()
    assert json.loads(waiting.value.path().read_text())["nbformat"] == 4
    linked = serve("--repository", "someone/course/blob/main/notebooks")
    page = open_page(FIRST, at=linked)
    expect(page.locator(".onward .interactive")).to_have_attribute(
        "href", f"https://colab.research.google.com/github/someone/course/blob/main/notebooks/{FIRST}.ipynb"
    )


def test_the_keyboard_alone_suffices(open_page: Opened):
    page = open_page(FIRST)
    reached = set()
    for _ in range(400):
        page.keyboard.press("Tab")
        reached.add(
            page.evaluate("() => `${document.activeElement.getAttribute('class')}#${document.activeElement.id}`")
        )
        if page.evaluate("document.activeElement.closest('.onward') !== null"):
            break
    else:
        pytest.fail("the keyboard is caught")
    assert any("cm-content" in name for name in reached)
    assert any("start" in name for name in reached)
    assert any("run" in name.split("#")[0].split() for name in reached)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", ["", *ORDER])
def test_nothing_stands_in_the_way_of_anybody(open_page: Opened, name: str, scheme: str):
    """axe-core finds no violation, at a desk and on a phone."""
    page = open_page(name, color_scheme=scheme, reduced_motion="reduce")
    if name:
        page.locator(".question input").first.check()
        type_code(page, first_title(name), "1 / 0")
        run(page, first_title(name), "failed")
    for width in (1280, 390):
        page.set_viewport_size({"width": width, "height": 900})
        found = axe.Axe().run(page)
        assert found.violations_count == 0, found.generate_report()
        assert page.evaluate("document.documentElement.scrollWidth") <= width, "it scrolls sideways"
    if name:
        cell(page, first_title(name)).locator(".reset").click()


def first_title(name: str) -> str:
    return next(course_module.lesson(name).of_kind(Code)).title


@pytest.mark.parametrize(
    "headers",
    [
        {"Host": "evil.example"},
        {"Host": "localhost:1"},
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
    ],
)
@pytest.mark.parametrize("path", ["", FIRST, f"events/{FIRST}", f"do/{FIRST}/run", "assets/lessons.css"])
def test_foreign_hosts_and_origins_are_refused_streams_too(
    open_page: Opened, course: Served, headers: dict[str, str], path: str
):
    page = open_page()
    (cookie,) = page.context.cookies()
    assert cookie["httpOnly"]
    assert cookie["sameSite"] == "Strict"
    own = {"Cookie": f"{cookie['name']}={cookie['value']}", "Origin": course.home.rstrip("/")}
    data = b'{"cells": [{"cell": "a", "code": "1"}]}' if path.startswith("do/") else None

    def status(given: dict[str, str]) -> int:
        try:
            with urllib.request.urlopen(urllib.request.Request(course.home + path, data, given), timeout=10) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as error:
            error.close()
            return error.code

    assert status(own) == 200
    assert status({**own, **headers}) in (403, 421)
    assert status({key: value for key, value in own.items() if key != "Cookie"}) == 403
