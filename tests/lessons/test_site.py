"""Pages as HTML: whole and readable as files, without a script; and nothing that is shown in them can become one."""

from __future__ import annotations

import base64
import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from dataclasses import dataclass, field
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import unquote, urlsplit

import pytest

from fallline.lessons import figures, markup, outputs, site
from fallline.lessons.course import (
    ORDER,
    Code,
    Component,
    Header,
    Lesson,
    Option,
    Prose,
    Question,
    Related,
    Stamp,
    course,
    lesson,
)

PAGES = ("index", *ORDER)
VOID = {"meta", "link", "img", "input", "br", "hr", "col", "source", "wbr", "base", "area", "embed", "track"}
ADDRESSES = ("href", "src", "srcset", "action", "formaction", "poster", "data", "xlink:href", "background", "ping")


@dataclass(eq=False)
class Element:
    """An element of a page, with its text and the elements around it."""

    tag: str
    pairs: list[tuple[str, str | None]]
    around: tuple[Element, ...]
    text: str = ""

    @property
    def attributes(self) -> dict[str, str]:
        return {name: value or "" for name, value in self.pairs}

    def __getitem__(self, name: str) -> str:
        return self.attributes[name]

    def get(self, name: str) -> str:
        return self.attributes.get(name, "")


@dataclass(eq=False)
class Page(HTMLParser):
    """A page as a browser reads it: its elements in their order."""

    html: str
    elements: list[Element] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[Element] = []
        self.wrong: list[str] = []
        self.feed(self.html)
        self.close()
        self.wrong += [f"<{element.tag}> is never closed" for element in self.open]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append(Element(tag, attrs, tuple(self.open)))
        if tag not in VOID:
            self.open.append(self.elements[-1])

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append(Element(tag, attrs, tuple(self.open)))

    def handle_endtag(self, tag: str) -> None:
        if self.open and self.open[-1].tag == tag:
            self.open.pop()
        else:
            self.wrong.append(f"</{tag}> at {self.getpos()} closes nothing")

    def handle_data(self, data: str) -> None:
        for element in self.open:
            element.text += data

    def of(self, *tags: str) -> list[Element]:
        return [element for element in self.elements if element.tag in tags]

    def with_(self, attribute: str) -> list[Element]:
        return [element for element in self.elements if attribute in element.attributes]

    @property
    def ids(self) -> list[str]:
        return [element["id"] for element in self.with_("id")]

    def executable(self) -> list[str]:
        """What a browser would execute, or take from elsewhere for a part of the page."""
        found = [
            f"<{element.tag}>" for element in self.of("script", "iframe", "object", "embed", "base", "form", "frame")
        ]
        for element in self.elements:
            for name, value in element.attributes.items():
                address = re.sub(r"[\s\x00-\x1f]", "", value).lower()
                if name.startswith("on") or name in ("style", "srcdoc", "http-equiv"):
                    found.append(f"<{element.tag} {name}>")
                elif name in ADDRESSES and (
                    address.startswith(("javascript:", "vbscript:", "data:text", "data:application"))
                    or (element.tag != "a" and re.match(r"\w+://|//", address))
                ):
                    found.append(f"<{element.tag} {name}={value}>")
        return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The course as files."""
    made = tmp_path_factory.mktemp("site") / "deep" / "course"
    assert site.write(made) == [made / f"{name}.html" for name in PAGES]
    return made


@pytest.fixture(scope="module")
def still(folder: Path) -> dict[str, Page]:
    """The pages of those files."""
    return {name: Page((folder / f"{name}.html").read_text(encoding="utf-8")) for name in PAGES}


@pytest.fixture(scope="module")
def live() -> dict[str, Page]:
    """The pages with a server behind them."""
    own = {name: Page(site.page(name, live=True, nonce="n0nce")) for name in ORDER}
    return own | {"index": Page(site.index(live=True, nonce="n0nce", done={ORDER[0]: "1 of 7 questions right"}))}


# Files.


def test_there_is_a_file_for_every_page_and_notebook_and_no_script(folder: Path):
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert {f"{name}.html" for name in PAGES} | {f"notebooks/{name}.ipynb" for name in ORDER} <= found
    assert "assets/lessons.css" in found
    assert not [name for name in found if name.endswith((".js", ".mjs", ".py"))]
    fonts = [name for name in found if name.endswith(".woff2")]
    assert fonts
    assert [name for name in found if name.endswith(".LICENSE.txt")]


def test_writing_again_changes_nothing(folder: Path):
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    site.write(folder)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("name", PAGES)
def test_a_still_page_has_nothing_to_execute(still: dict[str, Page], name: str):
    assert still[name].executable() == []
    assert not still[name].of("button", "noscript", "style")


def target(folder: Path, name: str, address: str) -> tuple[Path, str]:
    """The file that an address on a page leads to, and the place in it."""
    parts = urlsplit(address)
    assert not parts.query, address
    return (folder / unquote(parts.path) if parts.path else folder / f"{name}.html"), unquote(parts.fragment)


def external(address: str) -> bool:
    return bool(urlsplit(address).scheme or urlsplit(address).netloc)


@pytest.mark.parametrize("name", PAGES)
def test_everything_a_still_page_points_to_is_there(folder: Path, still: dict[str, Page], name: str):
    seen = 0
    for element in still[name].elements:
        for attribute in ADDRESSES:
            address = element.get(attribute)
            if attribute not in element.attributes or external(address):
                continue
            path, fragment = target(folder, name, address)
            assert path.is_file(), f"{element.tag} {attribute}={address}"
            assert path.resolve().is_relative_to(folder.resolve())
            if fragment:
                assert fragment in still[path.stem].ids, address
            seen += 1
    assert seen > 5


def test_everything_the_style_sheet_points_to_is_there(folder: Path):
    css = (folder / "assets" / "lessons.css").read_text(encoding="utf-8")
    addresses = re.findall(r"url\(\s*[\"']?(.*?)[\"']?\s*\)", css)
    assert addresses
    for address in addresses:
        assert not external(address), address
        assert (folder / "assets" / address).is_file(), address
    assert "@import" not in css
    assert not {path.name for path in folder.rglob("*.woff2")} - {Path(address).name for address in addresses}


def test_the_style_sheet_names_its_rules_only_for_what_there_is(folder: Path):
    css = (folder / "assets" / "lessons.css").read_text(encoding="utf-8")
    assert css.count("{") == css.count("}")
    used = set(re.findall(r"var\((--[\w-]+)\)", css))
    assert used <= set(re.findall(r"(--[\w-]+):", css))


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_to_the_web_in_the_open_only(still: dict[str, Page], name: str):
    for element in still[name].of("a"):
        if external(element["href"]):
            assert element["href"].startswith("https://"), element["href"]
            assert "noopener" in element["rel"]


# What a reader, and a reader's tools, find.


@pytest.mark.parametrize("form", ["still", "live"])
@pytest.mark.parametrize("name", PAGES)
def test_a_page_is_well_made(name: str, form: str, request: pytest.FixtureRequest):
    page: Page = request.getfixturevalue(form)[name]
    assert page.wrong == []
    assert page.html.startswith("<!doctype html>")
    assert "{{" not in page.html
    assert "{%" not in page.html
    (root,) = page.of("html")
    assert root["lang"] == "en"
    (title,) = page.of("title")
    assert title.text.strip()
    assert [element["content"] for element in page.of("meta") if element.get("name") == "description"] != [""]
    for element in page.elements:
        assert len(dict(element.pairs)) == len(element.pairs), f"{element.tag} has an attribute twice"
        if element.tag in ("p", "div", "ul", "ol", "table", "pre", "section", "fieldset", "h1", "h2"):
            assert not [outer for outer in element.around if outer.tag in ("p", "h1", "h2", "label", "legend", "span")]


@pytest.mark.parametrize("form", ["still", "live"])
@pytest.mark.parametrize("name", PAGES)
def test_a_page_is_made_for_every_reader(name: str, form: str, request: pytest.FixtureRequest):
    page: Page = request.getfixturevalue(form)[name]
    assert len(page.of("h1")) == len(page.of("main")) == 1
    levels = [int(element.tag[1]) for element in page.of("h1", "h2", "h3", "h4", "h5", "h6")]
    assert levels[0] == 1
    assert all(later <= earlier + 1 for earlier, later in pairwise(levels))
    assert len(set(page.ids)) == len(page.ids), sorted(name for name in page.ids if page.ids.count(name) > 1)
    assert all(page.ids)
    for image in page.of("img"):
        assert "alt" in image.attributes, image.get("src")[:80]
        assert image["alt"].strip() or image["src"].endswith("mark.svg"), "a figure says what it is"
    labelled = {label["for"] for label in page.of("label") if label.text.strip()}
    for control in page.of("input", "select", "textarea"):
        assert control["id"] in labelled
    for button in page.of("button", "a", "summary"):
        assert button.text.strip() or button.get("aria-label")
    for attribute in ("aria-describedby", "aria-labelledby", "aria-controls", "for"):
        for element in page.with_(attribute):
            assert element[attribute].split()
            assert set(element[attribute].split()) <= set(page.ids), element[attribute]


@pytest.mark.parametrize("name", ORDER)
def test_the_contents_of_a_page_name_its_headings(still: dict[str, Page], name: str):
    page = still[name]
    (article,) = page.of("article")
    headings = [(element.get("id"), element.text) for element in page.of("h2") if article in element.around]
    listed = [
        (element["href"].removeprefix("#"), element.text)
        for element in page.of("a")
        if any(outer.get("class") == "contents" for outer in element.around)
    ]
    assert listed == headings
    assert len(headings) > 3


@pytest.mark.parametrize("name", ORDER)
def test_every_output_stands_under_its_code(still: dict[str, Page], name: str):
    """In the words in which it was printed, with every figure as an image."""
    sections = {element["data-cell"]: element for element in still[name].of("section") if element.get("data-cell")}
    codes = list(lesson(name).of_kind(Code))
    assert [code.name for code in codes] == list(sections)
    for code in codes:
        section = sections[code.name]
        inside = [element for element in still[name].elements if section in element.around]
        assert next(element.text for element in inside if element.tag == "code") == code.source
        printed = "".join(output["text"] for output in code.outputs if "text" in output)
        assert "".join(e.text for e in inside if e.tag == "pre" and e.get("class") != "highlight") == printed
        drawn = [output for output in code.outputs if "data" in output]
        images = [element for element in inside if element.tag == "img"]
        assert len(images) == len(drawn)
        for image in images:
            assert image["src"].startswith("data:image/svg+xml;base64,")
            assert int(image["width"]) > 100
            assert int(image["height"]) > 100


def test_the_loss_before_training_is_the_one_that_torch_gives(still: dict[str, Page]):
    assert any(element.text == "Loss: 14.7868\n" for element in still[ORDER[0]].of("pre"))


@pytest.mark.parametrize("form", ["still", "live"])
@pytest.mark.parametrize("name", ORDER)
def test_every_option_has_its_reason_beside_it(name: str, form: str, request: pytest.FixtureRequest):
    page: Page = request.getfixturevalue(form)[name]
    questions = list(lesson(name).of_kind(Question))
    assert questions
    fields = page.of("fieldset")
    assert [element["data-question"] for element in fields] == [question.name for question in questions]
    for question, around in zip(questions, fields, strict=True):
        inside = [element for element in page.elements if around in element.around]
        reasons = [element for element in inside if element.get("class") == "reason"]
        inputs = [element for element in inside if element.tag == "input"]
        assert len(reasons) == len(inputs) == len(question.options)
        for option, reason, control in zip(question.options, reasons, inputs, strict=True):
            assert not [outer for outer in (*reason.around, reason) if "hidden" in outer.attributes]
            assert control["aria-describedby"] == reason["id"]
            said = Page(markup.inline(f"{option.reason}").join(("<p>", "</p>"))).elements[0].text
            assert reason.text == f"{'Right.' if option.right else 'Not this one.'} {said}"
            assert ("right" in reason.around[-1]["class"].split()) == option.right


def test_reasons_appear_without_a_script(folder: Path):
    css = (folder / "assets" / "lessons.css").read_text(encoding="utf-8")
    assert re.search(r"\.option:has\(input:checked\) \.reason \{ display: block; \}", css)
    printed = css[css.index("@media print") :]
    assert re.search(r"\.option \.reason \{ display: block; \}", printed), "all of them stand on paper"


def test_a_still_page_says_what_only_a_live_one_can(still: dict[str, Page]):
    moving = [name for name in ORDER if list(lesson(name).of_kind(Component))]
    assert moving
    for name in moving:
        (text,) = {element.text for element in still[name].of("section") if "move" in element.get("class").split()}
        assert "fallline learn" in text


# Colab.

REPOSITORY = "someone/course/blob/main/notebooks"


def onward(page: Page) -> Element:
    """The link by which a learner goes on interactively."""
    (found,) = [element for element in page.of("a") if element.get("class") == "interactive"]
    return found


@pytest.mark.parametrize("name", ORDER)
@pytest.mark.parametrize("live", [False, True])
def test_a_page_links_to_colab_only_if_it_knows_where_the_notebooks_lie(name: str, live: bool):
    without, with_one = (onward(Page(site.page(name, live=live, repository=r))) for r in ("", REPOSITORY))
    assert without["href"] == f"notebooks/{name}.ipynb"
    assert "download" in without.attributes
    assert "colab" not in without.text.lower()
    assert with_one["href"] == f"https://colab.research.google.com/github/{REPOSITORY}/{name}.ipynb"
    assert "download" not in with_one.attributes
    assert "Download" not in with_one.text


def test_the_written_pages_link_to_colab_when_asked_to(tmp_path: Path):
    site.write(tmp_path, repository=REPOSITORY)
    for name in ORDER:
        page = Page((tmp_path / f"{name}.html").read_text(encoding="utf-8"))
        assert onward(page)["href"] == site.colab(REPOSITORY, name)


@pytest.mark.parametrize("hostile", ['x"><script>alert(1)</script>', "x' onclick='alert(1)", 'x" onclick="alert(1)'])
def test_no_repository_gets_out_of_its_link(hostile: str):
    page = Page(site.page(ORDER[0], repository=hostile))
    assert page.executable() == []
    assert onward(page)["href"].endswith(f"/{hostile}/{ORDER[0]}.ipynb")


# Live pages.


@pytest.mark.parametrize("name", PAGES)
def test_a_live_page_runs_the_servers_own_scripts_only(live: dict[str, Page], name: str):
    page = live[name]
    assert bool(page.of("script")) == (name != "index")
    for script in page.of("script"):
        assert script.text == ""
        assert script["src"].startswith("/assets/")
    for element in page.of("script", "link", "img"):
        address = element.get("src") or element.get("href")
        if not address.startswith("data:image/"):
            assert address.startswith("/assets/"), address
            assert (site.ASSETS / address.removeprefix("/assets/")).is_file(), address
    assert [thing for thing in page.executable() if thing != "<script>"] == []
    assert not page.of("style")
    (nonce,) = [element["content"] for element in page.of("meta") if element.get("name") == "style-nonce"]
    assert nonce == "n0nce"


@pytest.mark.parametrize("name", PAGES)
def test_a_live_page_links_to_what_the_server_has(live: dict[str, Page], name: str):
    own = {"/", "progress.json", *(f"/{page}" for page in ORDER), *(f"notebooks/{page}.ipynb" for page in ORDER)}
    for element in live[name].of("a"):
        address = element["href"]
        if address.startswith("#"):
            assert address[1:] in live[name].ids
        elif not external(address):
            assert address in own


def test_the_contents_tell_what_was_done_where_there_is_a_learner(live: dict[str, Page], still: dict[str, Page]):
    told = [element.text for element in live["index"].elements if element.get("class") == "done"]
    assert told == ["1 of 7 questions right"]
    assert not [element for element in still["index"].elements if element.get("class") == "done"]


# What is shown is never executed.

HOSTILE = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    '<img/src="x"/onerror="alert(1)">',
    '"><svg/onload=alert(1)>',
    "' onmouseover='alert(1)",
    '" onmouseover="alert(1)',
    "</pre></code></p><script>alert(1)</script>",
    "</textarea></title></style><iframe srcdoc='<script>alert(1)</script>'>",
    "<!--><script>alert(1)</script>-->",
    "<a href=javascript:alert(1)>x</a>",
    "&lt;script&gt;alert(1)&lt;/script&gt;",
    "{{ 7 * 7 }}{% raw %}",
    "<form action=//evil.example><button>x",
    "<base href=//evil.example>",
    "<p style=position:fixed>",
]
MARKDOWN = [
    "[x](javascript:alert(1))",
    "[x](JaVaScRiPt:alert(1))",
    "[x](java\nscript:alert(1))",
    "[x](&#106;avascript:alert(1))",
    "[x](data:text/html,<script>alert(1)</script>)",
    "[x](vbscript:alert(1))",
    '[x](https://a.example "\\" onclick=\\"alert(1)")',
    "[x]: javascript:alert(1)\n\n[x]",
    "<javascript:alert(1)>",
    "![x](javascript:alert(1))",
    '![x" onerror="alert(1)](x.png)',
    "```<script>alert(1)</script>\nx\n```",
    '```x"onclick="alert(1)\nx\n```',
    "```python\n</code></pre><script>alert(1)</script>\n```",
    "    <script>alert(1)</script>",
    "`<script>alert(1)</script>`",
    "# <script>alert(1)</script>",
    "| <script>alert(1)</script> |\n|---|\n| <img src=x onerror=alert(1)> |",
    "$<script>alert(1)</script>$",
    "$$<img src=x onerror=alert(1)>$$",
    r"$\text{<script>alert(1)</script>}$",
    r'$\text{<img/src="x"/onerror="alert(1)">}$',
    r"$\mathrm{<script>}$",
    r"$</annotation></semantics></math><script>alert(1)</script>$",
    r"$\text{</mtext></math><script>alert(1)</script>}$",
    r"$\text{&lt;script&gt;}$",
    r"$\href{javascript:alert(1)}{x}$",
    r"$\style{position:fixed}{x}$",
]


@pytest.mark.parametrize("text", [*HOSTILE, *MARKDOWN])
def test_markdown_makes_nothing_to_execute(text: str):
    for html in (markup.markdown(text), markup.inline(text)):
        page = Page(html)
        assert page.executable() == [], html
        assert page.wrong == [], html
        assert not page.of("svg", "style", "title", "textarea", "input", "button"), html
        assert text.startswith("!") or not page.of("img"), html


@pytest.mark.parametrize("text", HOSTILE)
def test_markup_in_text_and_code_is_shown_as_it_stands(text: str):
    quoted = text.replace("&lt;", "<").replace("&gt;", ">")  # Markdown reads entities
    assert "".join(element.text for element in Page(markup.markdown(text)).of("p")) == quoted
    assert Page(f"<pre>{markup.code(text)}</pre>").elements[0].text == text


def hostile_page(text: str) -> Lesson:
    """A page with a text at every place where there can be one."""
    data = {"output_type": "display_data", "metadata": {}}
    given = [
        {"output_type": "stream", "name": text, "text": text},
        {"output_type": "error", "ename": text, "evalue": text, "traceback": [text]},
        {**data, "data": {"text/html": text, "text/plain": text}},
        {**data, "data": {"application/javascript": text}},
        {**data, "data": {"image/png": text}},
        {**data, "data": {"image/svg+xml": f'<svg viewBox="0 0 9 9">{text}</svg>'}},
    ]
    option = Option(text, True, text)
    about = Header(text, 1, 1, text, text, text, 1, 0, None, None, (Related(text, text, url="https://a.example"),))
    blocks = (
        Prose(f"## {text}\n\n{text}"),
        Code("cell", text, text, given, caption=text, needs=text),
        Question("question", text, (option, option)),
        Component("see-it-move", text, text),
    )
    return Lesson("hostile", about, Stamp(text, text), blocks)


@pytest.fixture(params=HOSTILE)
def hostile(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A course of one page that is full of a text."""
    made = hostile_page(request.param)
    monkeypatch.setattr(site, "lesson", lambda name: made)
    monkeypatch.setattr(site, "course", lambda: [made])
    site._blocks.cache_clear()
    yield request.param
    site._blocks.cache_clear()


@pytest.mark.parametrize("live", [False, True])
def test_no_text_of_a_page_becomes_something_to_execute(hostile: str, live: bool):
    pages = [
        Page(site.page("hostile", live=live, nonce=hostile, repository=hostile)),
        Page(site.index(live=live, nonce=hostile, done={"hostile": hostile})),
    ]
    for page in pages:
        allowed = ["<script>"] if live and page is pages[0] else []
        assert page.executable() == allowed
        assert page.wrong == []
        assert all(image.get("src").startswith(("data:image/", "assets/", "/assets/")) for image in page.of("img"))
    shown = [element.text for element in pages[0].of("pre")]
    assert shown == [hostile, hostile, hostile, f"{hostile}\n", "\n"]


def test_a_figure_is_an_image_in_which_no_script_runs():
    svg = '<svg viewBox="0 0 72 36" onload="alert(1)"><script>alert(1)</script></svg>'
    (shown,) = outputs.of_message("display_data", {"data": {"image/svg+xml": svg, "text/html": svg}})
    assert (shown["kind"], shown["width"], shown["height"]) == ("figure", 96, 48)
    assert re.fullmatch(r"data:image/svg\+xml;base64,[\w+/=]+", shown["source"])


@pytest.mark.parametrize(
    "svg",
    [
        "",
        "no figure",
        "<svg/>",
        "<svg></svg>",
        '<svg xmlns="http://www.w3.org/2000/svg" width="30" height="20"><circle r="9"/></svg>',
        '<svg viewBox="-5 -5 10 10"></svg>',
        "<svg viewBox='0 0 10 10'></svg>",
        '<svg viewBox="0,0,10,10"></svg>',
        '<svg viewBox="0 0 . ."></svg>',
        "<SVG VIEWBOX='0 0 1 1'></SVG>",
        '<svg:svg xmlns:svg="http://www.w3.org/2000/svg" viewBox="0 0 1 1"/>',
    ],
)
def test_a_figure_that_matplotlib_did_not_draw_disturbs_nobody(svg: str):
    """A learner's code may show any figure. It is shown, or said to be none."""
    (shown,) = outputs.of_message("display_data", {"data": {"image/svg+xml": svg}})
    assert shown["kind"] in ("figure", "text")


# Formulas.


def formulas() -> list[tuple[str, bool]]:
    """Every formula in the Markdown of the course, and whether it stands on a line of its own."""
    found: list[tuple[str, bool]] = []
    with pytest.MonkeyPatch.context() as patch:
        convert = markup.formula
        patch.setattr(
            markup, "formula", lambda latex, block: found.append((latex, block)) or convert(latex, block=block)
        )
        for page in course():
            texts = [block.text for block in page.blocks if isinstance(block, Prose | Component)]
            texts += [code.caption for code in page.of_kind(Code)]
            for question in page.of_kind(Question):
                texts += [
                    question.prompt,
                    *(part for option in question.options for part in (option.text, option.reason)),
                ]
            for text in texts:
                markup.markdown(text)
    return list(dict.fromkeys(found))


FORMULAS = formulas()
MATHML = "{http://www.w3.org/1998/Math/MathML}"


def test_there_are_formulas_of_both_kinds():
    assert {block for _, block in FORMULAS} == {False, True}
    assert len(FORMULAS) > 20


@pytest.mark.parametrize(("latex", "block"), FORMULAS, ids=[latex for latex, _ in FORMULAS])
def test_a_formula_is_well_formed_and_keeps_its_latex(latex: str, block: bool):
    tree = ET.fromstring(markup.formula(latex, block=block))
    assert tree.tag == f"{MATHML}math"
    assert tree.get("display") == ("block" if block else "inline")
    (semantics,) = tree
    drawn, annotation = semantics
    assert annotation.tag == f"{MATHML}annotation"
    assert annotation.text == latex.strip()
    assert "".join(drawn.itertext()).strip()
    unread = [text for text in drawn.itertext() if "\\" in text]
    assert not unread, "a command was not understood"


@pytest.mark.parametrize(
    "latex", [r"a < b", r"a > b", r"\text{a & b}", r"\text{if } x < 0", r"\text{1 < 2}", r"a \& b"]
)
def test_signs_of_markup_in_a_formula_are_signs(latex: str):
    ET.fromstring(markup.formula(latex))


# Figures.

FIGURES = {
    f"{page.name}, {code.title}": output["data"]["image/svg+xml"]
    for page in course()
    for code in page.of_kind(Code)
    for output in code.outputs
    if "image/svg+xml" in output.get("data", {})
}
SVG = "{http://www.w3.org/2000/svg}"
COLOUR = re.compile(r"#[0-9a-fA-F]{3,8}\b")


def painted(element: ET.Element, above: dict[str, str]) -> Iterator[tuple[ET.Element, dict[str, str]]]:
    """The elements of a figure with their style, what they inherit included."""
    own = dict(part.split(":", 1) for part in element.get("style", "").split(";") if ":" in part)
    own = {**above, **{name.strip(): value.strip() for name, value in own.items()}}
    own |= {name: element.attrib[name] for name in ("fill", "stroke") if name in element.attrib}
    if element.tag not in (f"{SVG}defs", f"{SVG}clipPath"):
        yield element, own
        for inner in element:
            yield from painted(inner, own)


@pytest.mark.parametrize("svg", FIGURES.values(), ids=FIGURES)
def test_a_figure_follows_the_reader_into_the_dark(svg: str):
    themed = figures.themed(svg)
    ET.fromstring(themed)
    style = re.search(r"<style>(.*?)</style>", themed, re.DOTALL)
    assert style is not None
    light, dark = re.split(r"@media\s*\(prefers-color-scheme:\s*dark\)", style[1])
    defined = [dict(re.findall(r"(--\w+):\s*(#[0-9a-f]{6})", part)) for part in (light, dark)]
    assert defined[0].keys() == defined[1].keys()
    assert {defined[0][name]: defined[1][name] for name in defined[0]} == figures.COLOURS
    rest = themed.replace(style[0], "", 1)
    assert not set(COLOUR.findall(rest.lower())), "a colour that stays what it was"
    assert set(re.findall(r"var\((--\w+)\)", rest)) <= defined[0].keys()
    assert re.sub(r"var\((--\w+)\)", lambda found: defined[0][found[1]], rest) == svg[svg.index("<svg") :]


@pytest.mark.parametrize("svg", FIGURES.values(), ids=FIGURES)
def test_nothing_in_a_figure_is_left_to_be_black(svg: str):
    """What has no colour of its own is black, which cannot be seen on a dark page."""
    seen = 0
    for element, style in painted(ET.fromstring(svg), {}):
        if element.tag in {f"{SVG}{name}" for name in ("text", "tspan", "path", "use", "rect", "circle", "line")}:
            assert "fill" in style, ET.tostring(element)
            assert style["fill"] in figures.COLOURS or style["fill"] == "none", style
            assert style.get("stroke", "none") in figures.COLOURS or style.get("stroke", "none") == "none", style
            seen += 1
    assert seen > 10


@pytest.mark.parametrize("svg", FIGURES.values(), ids=FIGURES)
def test_a_figure_needs_nothing_from_elsewhere(svg: str):
    for element in ET.fromstring(figures.themed(svg)).iter():
        assert element.tag != f"{SVG}script"
        for name, value in element.attrib.items():
            if name.endswith("href"):
                assert value.startswith(("#", "data:image/")), value
            assert not re.search(r"url\((?!#)", value), value
    assert "@font-face" not in svg
    assert "@import" not in svg


@pytest.mark.parametrize("svg", FIGURES.values(), ids=FIGURES)
def test_the_size_of_a_figure_is_that_of_its_points(svg: str):
    width, height = figures.size(svg)
    root = ET.fromstring(svg)
    assert root.get("width") == f"{root.get('viewBox').split()[2]}pt"
    assert width == pytest.approx(float(root.get("width").removesuffix("pt")) / 72 * 96, abs=0.5)
    assert height == pytest.approx(float(root.get("height").removesuffix("pt")) / 72 * 96, abs=0.5)


def test_colours_of_the_light_theme_are_those_that_figures_are_drawn_with():
    drawn = (site.ASSETS / "matplotlibrc").read_text(encoding="utf-8")
    settings = [line for line in drawn.splitlines() if not line.startswith("#")]
    used = {f"#{colour}" for line in settings for colour in re.findall(r"\b[0-9a-f]{6}\b", line)}
    assert used
    assert used <= figures.COLOURS.keys()


SAME = SimpleNamespace(
    yes={
        "the same": ('<path d="M 1 2"/>', '<path d="M 1 2"/>'),
        "last digits": ('<path d="M 1.001 -2"/>', '<path d="M 1.002 -2.04"/>'),
        "as a power of ten": ('<path d="M 1e-5 2"/>', '<path d="M 0.00002 2"/>'),
        "another day": ("<metadata>2020 a</metadata><g/>", "<metadata>\n2021 b\n</metadata><g/>"),
        "what looks like a huge number": ('<use href="#m4e999b"/>', '<use href="#m4e999b"/>'),
        "a colour that looks like one": ('<g style="fill: #12e999"/>', '<g style="fill: #12e999"/>'),
        "nothing": ("", ""),
    },
    no={
        "a coordinate": ('<path d="M 1 2"/>', '<path d="M 1 2.1"/>'),
        "a sign": ('<path d="M 1 2"/>', '<path d="M 1 -2"/>'),
        "a command": ('<path d="M 1 2"/>', '<path d="L 1 2"/>'),
        "a text": ("<text>1.001</text>", "<text>1.002</text>"),
        "a text of words": ("<text>loss</text>", "<text>gain</text>"),
        "one more element": ("<g/>", "<g/><g/>"),
        "one more number": ('<path d="M 1 2"/>', '<path d="M 1 2 3"/>'),
        "a colour": ('<g style="fill: #0072b2"/>', '<g style="fill: #d55e00"/>'),
        "the last digit of a colour": ('<g style="fill: #0072b2"/>', '<g style="fill: #0072b3"/>'),
        "another element": ('<circle r="1"/>', '<path r="1"/>'),
        "no number": ('<path d="M 1 nan"/>', '<path d="M 1 2"/>'),
        "nothing and something": ("", "<g/>"),
    },
)


@pytest.mark.parametrize(("one", "other"), SAME.yes.values(), ids=SAME.yes)
def test_figures_that_differ_in_nothing_one_could_see_are_the_same(one: str, other: str):
    assert figures.same_figure(one, other)
    assert figures.same_figure(other, one)


@pytest.mark.parametrize(("one", "other"), SAME.no.values(), ids=SAME.no)
def test_figures_that_differ_are_not_the_same(one: str, other: str):
    assert not figures.same_figure(one, other)
    assert not figures.same_figure(other, one)


def test_every_figure_is_the_same_as_itself_and_as_no_other():
    for name, svg in FIGURES.items():
        assert [other for other in FIGURES if figures.same_figure(svg, FIGURES[other])] == [name]


def test_pages_hold_the_figures_as_they_follow_the_reader(still: dict[str, Page]):
    shown = [image["src"] for name in ORDER for image in still[name].of("img") if "figure" in image.get("class")]
    decoded = [base64.b64decode(address.partition(",")[2]).decode() for address in shown]
    assert decoded == [figures.themed(svg) for svg in FIGURES.values()]
