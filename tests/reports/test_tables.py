"""The terminal's view of a result: the answer first, a table that fits, and the warnings."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fallline.evidence.sentences import metric_text
from fallline.reports import ranking_table, summary


def test_the_answer_comes_first_and_everything_fits_a_hundred_columns(result) -> None:
    text = summary(result)
    flat = " ".join(text.split())
    assert flat.startswith(result.ranking.sentence)
    assert max(map(len, text.splitlines())) <= 100


def test_the_table_shows_the_numbers_of_the_ranking(result) -> None:
    lines = summary(result).splitlines()
    for place, entry in enumerate(result.ranking, start=1):
        (line,) = [line for line in lines if line.strip().startswith(f"{place} ")]
        assert entry.label in line
        assert metric_text(entry) in line
        assert f"{entry.setting['lr']:.4g}" in line
        assert f"{entry.lr_decades:.1f}" in line


def test_the_share_of_diverged_trials_is_counted_over_all_configurations(result) -> None:
    table = ranking_table(result)
    shown = list(table.columns[-1].cells)
    for entry, share in zip(result.ranking, shown, strict=True):
        own = result.trials.filter(result.trials["optimizer"] == entry.label)
        assert share == f"{100 * (own['status'] == 'diverged').mean():.0f} %"


def test_a_best_value_on_the_edge_of_its_grid_is_marked_and_warned_of(make_result) -> None:
    result = make_result(("adam",), rates=3, seeds=4, steps=20)
    assert "▲" not in summary(result)
    entry = replace(result.ranking[0], on_edge=(("lr", "high"),))
    edged = replace(result, ranking=replace(result.ranking, entries=(entry,)))
    text = " ".join(summary(edged).split())
    assert "lr 0.01 ▲" in text
    assert "is the highest of its grid; search higher" in text


def test_interrupted_trials_and_few_seeds_are_warned_of(make_result) -> None:
    text = " ".join(summary(make_result(seeds=4, steps=20, interrupted=3)).split())
    assert "3 of 208 trials were interrupted" in text
    assert "3 reporting seeds cannot show a difference" in text
    assert "are few" not in text
    alone = " ".join(summary(make_result(("adam",), seeds=4, steps=20)).split())
    assert "3 reporting seeds are few: take 11 seeds or more (8 of them reporting)" in alone


@pytest.mark.parametrize(
    "label",
    ["[red]adam[/red]", "an optimizer with a name that is far longer than any table has room for " * 2],
)
def test_odd_names_stay_as_they_are_and_within_the_width(make_result, label: str) -> None:
    text = summary(make_result((label, "sgd"), rates=3, seeds=4, steps=20))
    assert max(map(len, text.splitlines())) <= 100
    assert label.split()[0] in text


def test_a_result_of_nothing_but_divergence_is_told_as_such(make_result) -> None:
    text = " ".join(summary(make_result(rates=3, seeds=4, steps=20, all_diverged=True)).split())
    assert text.startswith("Every optimizer diverged")
    assert "100 %" in text


def test_a_table_is_text_and_nothing_more_in_a_notebook(result, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rich takes a kernel for a screen of its own, and would show the table a second time."""
    plain = summary(result)
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    shown = []
    monkeypatch.setattr("rich.jupyter.display", lambda *given: shown.append(given))
    assert summary(result) == plain
    assert not shown
