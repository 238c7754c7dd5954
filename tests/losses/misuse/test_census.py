"""The census of misuses as a test: every misuse is caught with its code, and correct uses are left in peace.

The cases are those of benchmarks/census, which is no part of the package.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fallline.losses.misuse.check import check

BENCHMARKS = Path(__file__).resolve().parents[3] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import misuse_census  # noqa: E402
from census.case import CORRECT_USES, MISUSES, Case  # noqa: E402
from census.tables import ALLOWED_WARNINGS, Census  # noqa: E402
from census.verdicts import FalllineVerdict, TorchVerdict, fallline_verdict, tensors, torch_verdict  # noqa: E402

SEEDS = (0, pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@functools.cache
def asked(case: Case, seed: int) -> FalllineVerdict:
    return fallline_verdict(case, check, seed)


def told(verdict: FalllineVerdict) -> str:
    return verdict.raised or "\n".join(map(str, verdict.findings)) or "nothing was found"


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", MISUSES)
def test_a_misuse_is_caught_with_its_code(name: str, seed: int) -> None:
    case = MISUSES[name]
    verdict = asked(case, seed)
    assert verdict.catches(case), f"{case.sentence} Expected {case.severity} {' or '.join(case.codes)}: {told(verdict)}"
    assert verdict.disturbed == ()


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", CORRECT_USES)
def test_a_correct_use_is_no_error_and_nothing_is_disturbed(name: str, seed: int) -> None:
    verdict = asked(CORRECT_USES[name], seed)
    assert not verdict.raised
    assert verdict.worst != "error", told(verdict)
    assert verdict.disturbed == ()


@pytest.mark.parametrize("seed", SEEDS)
def test_at_most_two_in_a_hundred_correct_uses_are_warned_of(seed: int) -> None:
    warned = [name for name, case in CORRECT_USES.items() if asked(case, seed).worst == "warning"]
    assert len(warned) <= ALLOWED_WARNINGS * len(CORRECT_USES), warned


@pytest.mark.parametrize("name", CORRECT_USES)
def test_torch_runs_every_correct_use(name: str) -> None:
    verdict = torch_verdict(CORRECT_USES[name])
    assert verdict.said in ("nothing", "has none"), verdict.messages


def test_the_census_is_large_enough_and_every_case_says_what_it_shows() -> None:
    assert len(MISUSES) >= 60
    assert len(CORRECT_USES) >= 120
    for case in (*MISUSES.values(), *CORRECT_USES.values()):
        assert case.sentence.endswith("."), case.name


@pytest.mark.parametrize("name", ["mse_of_a_fresh_regression", "cross_entropy_of_a_trained_classifier", "triplets"])
def test_a_case_is_drawn_alike_each_time(name: str) -> None:
    first, again = (_numbers(CORRECT_USES[name]) for _ in range(2))
    assert first
    assert first == again


def _numbers(case: Case) -> list[Any]:
    with case.seeded(0), case.under():
        scene = case.drawn()
    return [tensor.nan_to_num().tolist() for tensor in tensors((scene.prediction, scene.target))]


def test_the_census_counts_what_its_verdicts_say() -> None:
    caught, missed = list(MISUSES.values())[:2]
    fine, flagged = list(CORRECT_USES.values())[:2]
    silent, found = FalllineVerdict(), fallline_verdict(caught, check)
    torchs = {case: TorchVerdict("nothing") for case in (caught, missed, fine, flagged)}
    ours = {caught: found, missed: silent, fine: silent, flagged: found}
    census = Census({c: torchs[c] for c in (caught, missed)}, {c: torchs[c] for c in (fine, flagged)}, ours)
    assert census.uncaught == [missed]
    assert census.flagged(found.worst) == [flagged]
    assert not census.holds


def test_the_command_lists_cases_and_tells_an_unknown_word(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["misuse_census.py", "--list", "--only", "double-sigmoid"])
    assert misuse_census.main() == 0
    assert "binary_logits_after_a_sigmoid_layer" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["misuse_census.py", "--only", "no such case"])
    with pytest.raises(SystemExit):
        misuse_census.main()
    assert "no such case" in capsys.readouterr().err
