"""Slim wrappers compute what whole ones do, and where torch's text is another, whole ones are made."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fallline.sweeps import compiled, wrapper
from fallline.sweeps.programs import Run
from fallline.sweeps.traced import trace

pytestmark = pytest.mark.skipif(compiled.why_not(torch.device("cpu")) is not None, reason="needs a C++ compiler")

# What the whole text has for programs whose weights are swapped while they run.
OF_WHOLE_ONES = "update_constant_buffer"


def step(parameters: Tensor, batch: Tensor, rates: Tensor) -> list[Tensor]:
    """Products, sums and an update in place; two results, one of them a single number in float64."""
    predicted = torch.bmm(batch.expand(len(parameters), -1, -1), parameters).tanh()
    parameters.sub_(rates[:, None, None] * predicted.mean(1, keepdim=True))
    return [predicted.square().sum((1, 2)), predicted.double().amax()]


def picked(table: Tensor, index: Tensor) -> list[Tensor]:
    return [table[index] * 2]


def tensors() -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(size, generator=generator) for size in ((3, 4, 2), (1, 6, 4), (3,))]


def made(folder: Path, function: Callable[..., list[Tensor]], given: list[Tensor]) -> tuple[Run, str]:
    """A compiled program, and the text of its wrapper."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FALLLINE_CACHE", str(folder))
        source = compiled.Source(trace(function, *given), given)
        ((_, run),) = compiled.compile_all({"it": source}, side_by_side=True)
    assert not isinstance(run, compiled.NotCompiled), run
    (package,) = folder.glob("*.pt2")
    with zipfile.ZipFile(package) as files:
        texts = [files.read(name).decode() for name in files.namelist() if name.endswith(".cpp")]
    (text,) = (text for text in texts if "AOTInductorModel::run_impl(" in text)
    return run, text


def assert_steps(run: Run) -> None:
    ours, theirs = tensors(), tensors()
    for _ in range(3):
        found, expected = run(ours), step(*theirs)
        assert [value.dtype for value in found] == [torch.float32, torch.float64]
        torch.testing.assert_close(list(found), expected)
    torch.testing.assert_close(ours, theirs)
    assert not torch.equal(ours[0], tensors()[0])


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The text that torch generates."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(wrapper, "slimmed", lambda text: None)
        run, text = made(tmp_path_factory.mktemp("whole"), step, tensors())
    assert_steps(run)
    assert OF_WHOLE_ONES in text
    return text


def test_what_this_torch_generates_becomes_slim(tmp_path: Path, whole: str):
    run, text = made(tmp_path, step, tensors())
    assert_steps(run)
    assert OF_WHOLE_ONES not in text
    assert len(text) < len(whole)
    other, _ = made(tmp_path / "another", picked, [torch.arange(5.0), torch.tensor([1, 3])])
    assert_steps(run)  # beside another program in the same process
    assert other([torch.arange(5.0), torch.tensor([4, 0])])[0].tolist() == [8, 0]


def test_text_that_is_not_what_was_expected_stays_whole(whole: str):
    assert wrapper.slimmed(whole) is not None
    landmarks = [
        '} // extern "C"',
        "void AOTInductorModel::run_impl(",
        ": AOTInductorModelBase(",
        "\nAOTIRuntimeError ",
    ]
    for landmark in landmarks:
        assert landmark in whole
        assert wrapper.slimmed(whole.replace(landmark, "something else")) is None, landmark


def test_a_program_with_constants_stays_whole(whole: str):
    with_one = re.sub(r"(AOTInductorModelBase\(\s*\d+,\s*\d+,\s*)0,", r"\g<1>1,", whole)
    assert with_one != whole
    assert wrapper.slimmed(with_one) is None


@pytest.mark.parametrize("slim", ["this is no C++", "int nothing_that_a_loader_asks_for;"])
def test_one_that_does_not_compile_or_load_is_made_again_whole(tmp_path: Path, monkeypatch, capfd, slim: str):
    monkeypatch.setattr(wrapper, "slimmed", lambda text: slim)
    run, text = made(tmp_path, step, tensors())
    assert_steps(run)
    assert OF_WHOLE_ONES in text
    assert "error" not in "".join(capfd.readouterr()).lower()


def test_one_that_fails_says_so_and_changes_nothing_else(tmp_path: Path):
    table = torch.arange(5.0)
    run, text = made(tmp_path, picked, [table, torch.tensor([1, 3])])
    assert OF_WHOLE_ONES not in text
    for wanted in (True, False):
        with torch.set_grad_enabled(wanted):
            with pytest.raises(RuntimeError):
                run([table, torch.tensor([1, 5])])
            assert torch.is_grad_enabled() is wanted
            assert run([table, torch.tensor([1, 4])])[0].tolist() == [2, 8]
            assert torch.is_grad_enabled() is wanted


def test_only_wrappers_for_processors_are_slim(whole: str, monkeypatch: pytest.MonkeyPatch):
    from torch._inductor.codecache import AotCodeCompiler

    compiled_texts = []
    monkeypatch.setattr(AotCodeCompiler, "compile", lambda graph, text, **named: compiled_texts.append(text))
    before = vars(AotCodeCompiler)["compile"]
    with wrapper.slim():
        for device in ("cuda", "cpu"):
            AotCodeCompiler.compile(None, whole, device_type=device)
        AotCodeCompiler.compile(None, "another text", device_type="cpu")
    assert vars(AotCodeCompiler)["compile"] is before
    assert compiled_texts == [whole, wrapper.slimmed(whole), "another text"]
