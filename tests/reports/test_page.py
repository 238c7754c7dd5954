"""The HTML report: one file that is whole, loads nothing, hides nothing and breaks on nobody's names."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from fallline.errors import RunDirectoryError
from fallline.evidence.sentences import interval_text, metric_text
from fallline.reports import html, write_report
from fallline.reports.page import sweep_code

VOID = {"meta", "link", "br", "img", "input", "hr"}


class Page(HTMLParser):
    """A page taken apart: its text, its scripts, its attributes, and whether every element is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[tuple[dict[str, str | None], str]] = []
        self.words: list[str] = []
        self.cells: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs) -> None:
        self.attributes.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "script":
            self.scripts.append((dict(attrs), ""))
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_startendtag(self, tag, attrs) -> None:
        self.attributes.append((tag, dict(attrs)))

    def handle_endtag(self, tag) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data) -> None:
        if self.open and self.open[-1] == "script":
            attributes, text = self.scripts[-1]
            self.scripts[-1] = (attributes, text + data)
        elif "style" not in self.open and "svg" not in self.open:
            self.words.append(data)
            if "td" in self.open or "th" in self.open:
                self.cells[-1] += data

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


@pytest.fixture(scope="module")
def source(result) -> str:
    return html(result)


@pytest.fixture(scope="module")
def page(source) -> Page:
    return Page(source)


def test_every_element_is_closed_and_ids_are_unique(page) -> None:
    assert page.open == []
    ids = [attributes["id"] for _, attributes in page.attributes if "id" in attributes]
    assert len(ids) == len(set(ids)) > 10


def test_the_answer_is_the_heading_of_the_page(page, result) -> None:
    assert [tag for tag, _ in page.attributes].count("h1") == 1
    assert result.ranking.sentence in page.text


@pytest.mark.parametrize(
    "part",
    [
        "Ranking",
        "Accuracy against learning rate",
        "Room for the learning rate",
        "Training loss",
        "How this ranking was made",
        "The winner in plain PyTorch",
        "print('<the winner>')",
        "The sweep again",
        "fallline sweep digits",
        "Exact settings",
        "Tuning seeds 0 to 2",
        "Reporting seeds 3 to 9",
        "A fresh torch.randperm of the training set each epoch",
        "torch 2.13.0",
        "vectorised: the model can be vectorised",
        "2 workers",
        "41.3 s",
        "scikit-learn's digits",
        "520: 416 completed, 104 diverged",
        "8,970 parameters",
        "fl.optim.rmsprop(lr=fl.grid([…]))",
        "This chart in words",
    ],
)
def test_it_holds(page, part: str) -> None:
    assert part in page.text


def test_no_evidence_is_the_headline_and_its_reasons_stand_below(make_result) -> None:
    source = html(make_result(rates=3, seeds=4, steps=20))
    heading = re.search(r"<h1.*?>(.*?)</h1>", source)
    lead = re.search(r'<p class="lead">(.*?)</p>', source)
    assert heading is not None
    assert lead is not None
    assert re.fullmatch("No evidence that [^:]* beats [^:]*[.]", heading[1])
    assert "3 reporting seeds cannot show a difference among 4 candidates" in lead[1]


def test_the_table_shows_the_numbers_of_the_ranking(page, result) -> None:
    cells = [" ".join(cell.split()) for cell in page.cells]
    for entry in result.ranking:
        at = cells.index(entry.label)
        assert cells[at + 1] == f"lr {entry.setting['lr']:.4g}"
        assert cells[at + 2] == f"{metric_text(entry)} ({interval_text(entry)})"
        assert metric_text(entry) == f"{entry.mean:.{len(metric_text(entry).split('.')[1])}f}"
        assert cells[at + 4].startswith(f"{entry.lr_low:.4g} to {entry.lr_high:.4g}")
        assert cells[at + 4].endswith(f"{entry.lr_decades:.1f} decades")


def test_nothing_is_fetched(page, source) -> None:
    for tag, attributes in page.attributes:
        assert tag not in ("link", "iframe", "img", "object", "embed", "base")
        for name in ("src", "href", "xlink:href", "action", "srcset", "data"):
            value = attributes.get(name) or "#"
            assert value.startswith("#"), (tag, name, value)
    style = "".join(re.findall(r"<style>(.*?)</style>", source, flags=re.DOTALL))
    assert "@import" not in style
    assert "url(" not in style
    (policy,) = [a["content"] for _, a in page.attributes if a.get("http-equiv") == "Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "http" not in policy


def test_the_libraries_are_there_once_and_draw_every_chart_in_both_themes(page) -> None:
    libraries = [text for attributes, text in page.scripts if len(text) > 500_000]
    assert len(libraries) == 1
    specs = {a["data-for"]: json.loads(text) for a, text in page.scripts if a.get("class") == "chart-spec"}
    places = {a["id"]: a for _, a in page.attributes if a.get("class") == "chart"}
    assert specs.keys() == places.keys() == {"sensitivity-lr", "room", "training-loss", "validation-metric"}
    assert all(place["aria-label"] for place in places.values())
    assert all(spec["$schema"].startswith("https://vega.github.io/schema/vega-lite/") for spec in specs.values())
    (themes,) = [json.loads(text) for attributes, text in page.scripts if attributes.get("id") == "themes"]
    assert themes.keys() == {"light", "dark"}


def test_readers_without_javascript_see_still_charts(source) -> None:
    stills = re.findall(r"<noscript><div class=\"still\"><svg.*?</svg>", source, flags=re.DOTALL)
    assert len(stills) == 4


def test_names_cannot_break_out_of_the_page(make_result) -> None:
    evil = "</script><script>alert(1)</script>"
    source = html(make_result((f"adam {evil}", "sgd"), rates=3, seeds=4, steps=20, task=f"<script>{evil}"))
    assert "<script>alert" not in source
    page = Page(source)
    assert page.open == []
    assert evil in page.text
    for attributes, text in page.scripts:
        if attributes.get("type") == "application/json":
            json.loads(text)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"optimizers": ("adam",), "rates": 1}, "adam at lr 0.0001 reaches"),
        ({"optimizers": ("adam",), "one_rate": True}, "Accuracy of every seed"),
        ({"all_diverged": True}, "Every optimizer diverged"),
        ({"all_diverged": True, "one_rate": True}, "Every optimizer diverged"),
        ({"seeds": 1}, "One seed chose the configurations and also reports them"),
        ({"seeds": 4}, "No evidence that"),
        ({"momenta": (0.0, 0.5, 0.9)}, "Accuracy against momentum"),
        ({"losses": ("cross_entropy", "mse")}, "Training loss (mse)"),
        ({"higher_is_better": False}, "lower is better"),
        ({"interrupted": 2}, "2 of 60 trials were interrupted"),
    ],
)
def test_every_kind_of_sweep_gives_a_sensible_page(make_result, arguments, words: str) -> None:
    page = Page(html(make_result(**{"rates": 3, "seeds": 5, "steps": 20, **arguments})))
    assert page.open == []
    assert words in page.text
    for nonsense in ("nan", "None", "inf ", "Undefined"):
        assert not re.search(rf"\b{nonsense}\b", page.text), nonsense


def test_a_result_without_recorded_steps_still_has_a_page(make_result) -> None:
    result = make_result(("adam",), rates=1, seeds=3, steps=20, all_diverged=True)
    empty = replace(
        result.history,
        step=result.history.step[:0],
        train_loss=result.history.train_loss[:, :0],
        evaluation_step=result.history.evaluation_step[:0],
        metric=result.history.metric[:, :0],
    )
    assert "nothing to draw" in Page(html(replace(result, history=empty))).text


def test_the_sweep_is_told_in_python_where_no_command_made_it(result) -> None:
    losses = [{"label": "mse", "code": "fl.losses.mse()"}, {"label": "huber", "code": "fl.losses.huber(delta=0.5)"}]
    code = sweep_code({**result.spec, "command": None, "losses": losses, "task_code": "fl.tasks.digits()"})
    assert "fl.tasks.digits()," in code
    compile(code.replace("[…]", "[1]"), "report", "exec")
    assert "losses=[fl.losses.mse(),fl.losses.huber(delta=0.5),]," in "".join(code.split())
    assert "seeds=[0, 1, 2, 3, 4, 5, 6, 7, 8, 9]" in code


def test_a_report_is_written_whole_and_replaces_an_older_one(result, source, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text("older")
    assert write_report(result, path) == path
    assert path.read_text(encoding="utf-8") == source
    assert list(tmp_path.iterdir()) == [path]


def test_a_report_that_cannot_be_written_says_so_and_leaves_nothing_behind(result, tmp_path: Path, monkeypatch) -> None:
    with pytest.raises(RunDirectoryError, match="No such file or directory"):
        write_report(result, tmp_path / "nowhere" / "report.html")

    def full(_: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    path = tmp_path / "report.html"
    path.write_text("older")
    with pytest.raises(RunDirectoryError, match="No space left on device"):
        write_report(result, path)
    assert path.read_text() == "older"
    assert list(tmp_path.iterdir()) == [path]


def test_importing_the_rooms_is_light() -> None:
    heavy = "torch", "altair", "vl_convert", "scipy.stats", "polars", "sklearn"
    code = f"import sys, fallline.evidence, fallline.reports; print([m for m in {heavy} if m in sys.modules])"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )
