"""Shapes and number types: each misuse is refused with its code and a line that mends it, correct uses pass."""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import vmap
from torch.nn import functional

from fallline import losses
from fallline.errors import LossMismatch
from fallline.losses.misuse import CODES, check, require

ELEMENTWISE = ["mse", "l1", "huber", "binary_cross_entropy_with_logits"]
EVERY_ELEMENTWISE = [
    *ELEMENTWISE, "smooth_l1", "log_cosh", "charbonnier", "binary_cross_entropy", "poisson_nll", "tweedie",
    "hinge", "soft_margin", "kl_div", "hinge_embedding",
]  # fmt: skip
zeros, ones = torch.zeros, torch.ones


def label(*values: int) -> Tensor:
    return torch.tensor(values)


def errors(loss: Any, prediction: Any, target: Any) -> list[str]:
    return [found.code for found in check(loss, prediction, target) if found.severity == "error"]


def severe(loss: Any, prediction: Any, target: Any) -> list[str]:
    return [found.code for found in check(loss, prediction, target) if found.severity != "note"]


@pytest.mark.parametrize("name", ELEMENTWISE)
@pytest.mark.parametrize(
    ("prediction", "target", "code", "fix"),
    [
        (zeros(3, 1), zeros(3), "broadcast", "target.unsqueeze(1)"),
        (zeros(3, 2, 1), zeros(3, 2), "shape", "target.unsqueeze(-1)"),
        (zeros(3), zeros(3, 1), "broadcast", "target.squeeze(-1)"),
        (zeros(4, 3), zeros(3, 4), "axis", "target.reshape(prediction.shape)"),
        (zeros(3, 2), zeros(3, 5), "shape", "as many outputs"),
        (zeros(3, 1), label(0, 1, 1)[:, None], "target-type", "target.to(prediction.dtype)"),
        (zeros(3, 1), zeros(3, 1, dtype=torch.float64), "target-type", "target.to(prediction.dtype)"),
        (label(1, 2), zeros(2), "detached", "without argmax"),
    ],
)
def test_elementwise_losses_refuse(name: str, prediction: Tensor, target: Tensor, code: str, fix: str) -> None:
    with pytest.raises(LossMismatch) as caught:
        require(losses.get(name)(), prediction, target)
    assert fix in str(caught.value)
    assert name in str(caught.value)
    assert code in errors(name, prediction, target)


@pytest.mark.parametrize("name", ELEMENTWISE)
@pytest.mark.parametrize("shape", [(3,), (3, 1), (3, 2, 2)])
def test_elementwise_losses_accept_equal_shapes(name: str, shape: tuple[int, ...]) -> None:
    require(losses.get(name)(), zeros(shape), ones(shape))
    assert severe(name, zeros(shape), ones(shape)) == []


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_nothing_is_broadcast_when_called_even_under_vmap(name: str) -> None:
    loss = losses.get(name)()
    with pytest.raises(LossMismatch, match="would be broadcast"):
        loss(zeros(3, 1), zeros(3))
    with pytest.raises(LossMismatch, match="would be broadcast"):
        vmap(loss)(zeros(2, 3, 1), zeros(2, 3))


def test_probabilities_are_not_broadcast_when_called() -> None:
    with pytest.raises(LossMismatch):
        losses.cross_entropy()(zeros(3, 2), zeros(3, 1))


@pytest.mark.parametrize("name", EVERY_ELEMENTWISE)
def test_a_column_against_a_row_is_refused_by_every_elementwise_loss(name: str) -> None:
    prediction, target = torch.rand(8, 1), (torch.arange(8) % 2).float()
    if name in ("hinge", "soft_margin", "hinge_embedding"):
        target = 2 * target - 1
    if name == "kl_div":
        prediction, target = prediction.log(), torch.full((8,), 0.125)
    assert errors(name, prediction, target) == ["broadcast"]
    torchs = losses.get(name)().torch_name
    if torchs:
        assert errors(getattr(nn, torchs)(), prediction, target) == ["broadcast"]


@pytest.mark.parametrize(
    ("prediction", "target", "fix"),
    [
        (zeros(4, 1, 8, 8), zeros(4, 8, 8), "target.unsqueeze(1)"),
        (zeros(4, 8, 8), zeros(4, 1, 8, 8), "target.squeeze(1)"),
        (zeros(4, 1), zeros(1, 4), "target.reshape(prediction.shape)"),
        (zeros(4, 1), zeros(4, 3), "Linear(3)"),
        (zeros(1, 1), zeros(1), "target.unsqueeze(1)"),
    ],
)
def test_what_torch_would_broadcast_is_an_error_with_its_own_fix(prediction: Tensor, target: Tensor, fix: str) -> None:
    [found] = [each for each in check(nn.L1Loss(), prediction, target) if each.severity == "error"]
    assert found.code == "broadcast"
    assert fix in found.fix


@pytest.mark.parametrize(
    ("prediction", "target", "code", "fix"),
    [
        (zeros(3, 2), zeros(3, 5), "shape", "Linear(5)"),
        (zeros(3, 2), zeros(4, 2), "batch-size", "same batch"),
        (zeros(5, 3), zeros(3, 7), "batch-size", "prediction.transpose(0, 1)"),
        (zeros(4, 3), zeros(3, 4), "axis", "target.T"),
        (zeros(3, 2, 1), zeros(3, 2), "shape", "target.unsqueeze(-1)"),
        (zeros(3, 4), zeros(12), "shape", "target.reshape(prediction.shape)"),
    ],
)
def test_what_torch_refuses_has_a_fix_here(prediction: Tensor, target: Tensor, code: str, fix: str) -> None:
    for loss in (nn.MSELoss(), nn.SmoothL1Loss(), losses.mse()):
        found = check(loss, prediction, target)[0]
        assert (found.severity, found.code) == ("error", code)
        assert fix in found.fix


@pytest.mark.parametrize(
    ("loss", "prediction", "target", "code", "fix"),
    [
        ("supervised_contrastive", torch.randn(8, 4), torch.arange(6) % 2, "batch-size", "same batch"),
        ("mse", torch.randn(8, 3), torch.randn(8, 1), "broadcast", "target.expand_as(prediction)"),
        ("cross_entropy", torch.tensor(1.0), torch.tensor(0), "shape", "BCEWithLogitsLoss"),
        ("cross_entropy", torch.randn(8, 3, 5), torch.arange(8) % 3, "shape", "prediction.flatten(2).mean(2)"),
        ("cross_entropy", torch.randn(8, 3), torch.zeros(8, 2).long(), "shape", "target[:, 0]"),
        (
            "linear_cross_entropy",
            (torch.randn(4, 6, 8), torch.randn(20, 8)),
            torch.randint(20, (24,)),
            "shape",
            "target.reshape(hidden.shape[:-1])",
        ),
    ],
)
def test_other_shapes_have_their_own_fix(loss: str, prediction: Any, target: Tensor, code: str, fix: str) -> None:
    found = check(loss, prediction, target)[0]
    assert (found.severity, found.code) == ("error", code)
    assert fix in found.fix


def test_one_target_for_all_is_less_severe_in_torch_which_may_mean_it() -> None:
    prediction = torch.randn(8, 3)
    assert severe(nn.MSELoss(), prediction, torch.randn(8, 1)) == ["broadcast"]
    assert errors(nn.MSELoss(), prediction, torch.randn(8, 1)) == []
    [one] = check(nn.MSELoss(), prediction, torch.tensor(1.0))  # torch warns; a GAN's target of 1
    assert (one.severity, one.code) == ("note", "broadcast")
    assert errors("mse", prediction, torch.randn(8, 1)) == ["broadcast"]
    assert severe(nn.MSELoss(), torch.zeros(1), torch.randn(8)) == ["broadcast"]
    prior = functools.partial(functional.kl_div, reduction="batchmean")
    assert severe(prior, prediction.log_softmax(1), torch.full((3,), 1 / 3)) == []


def test_a_callable_that_broadcasts_is_found_by_changing_the_order_of_the_targets() -> None:
    prediction, target = torch.randn(16, 1), torch.randn(16)
    assert errors(lambda p, t: (p - t).square().mean(), prediction, target) == ["broadcast"]
    assert errors(lambda p, t: (p.squeeze(1) - t).square().mean(), prediction, target) == []
    assert errors(lambda p, t: (p - t).square().mean(), prediction, target[:, None]) == []


@pytest.mark.parametrize(
    ("loss", "prediction", "target"),
    [
        (nn.GaussianNLLLoss(), (torch.randn(8, 1), torch.rand(8, 1)), torch.randn(8)),
        (nn.GaussianNLLLoss(), (torch.randn(8), torch.rand(8)), torch.randn(8, 1)),
        (losses.gaussian_nll(), (torch.randn(8, 1), torch.rand(8, 1)), torch.randn(8)),
        (nn.MarginRankingLoss(), (torch.randn(8, 1), torch.randn(8, 1)), ones(8)),
    ],
)
def test_a_mean_or_a_score_against_a_target_of_another_shape(loss: Any, prediction: Any, target: Tensor) -> None:
    assert errors(loss, prediction, target) == ["broadcast"]


@pytest.mark.parametrize(
    ("loss", "prediction", "target"),
    [
        (nn.GaussianNLLLoss(), (torch.randn(8, 3), torch.rand(8, 1)), torch.randn(8, 3)),
        (losses.gaussian_nll(), (torch.randn(8), torch.rand(8)), torch.randn(8, 1)),
        (losses.gaussian_nll(log_variance=True), torch.randn(8, 2), torch.randn(8)),
        (losses.margin_ranking(), torch.randn(8, 2), ones(8)),
        (losses.margin_ranking(), (torch.randn(8), torch.randn(8)), ones(8, 1)),
        (nn.MarginRankingLoss(), (torch.randn(8), torch.randn(8)), ones(8)),
    ],
)
def test_parts_that_fit_pass(loss: Any, prediction: Any, target: Tensor) -> None:
    assert severe(loss, prediction, target) == []


@pytest.mark.parametrize(
    ("prediction", "target", "code", "fix"),
    [
        (zeros(3), label(0, 1, 0), "one-class", "binary_cross_entropy_with_logits"),
        (zeros(3, 1), label(0, 0, 0), "one-class", "one output for each class"),
        (zeros(3, 2), label(0, 1), "batch-size", "same samples"),
        (zeros(3, 2), label(0, 1, 1)[:, None], "shape", "target.squeeze(-1)"),
        (zeros(3, 2), zeros(3, 1), "shape", "target.squeeze(-1).long()"),
        (zeros(3, 2), zeros(3), "target-type", "target.long()"),
        (zeros(3, 2), label(0, 1, 1).int(), "target-type", "target.long()"),
        (zeros(2, 2), label(0, 1, 1, 0).reshape(2, 2), "target-coding", "target.argmax(1)"),
        (zeros(3, 5, 4), zeros(3, 5).long(), "axis", "prediction.movedim(-1, 1)"),
        (zeros(5, 3, 4), zeros(3, 5).long(), "axis", "prediction.permute(1, 2, 0)"),
        (zeros(3, 4, 5), torch.full((3, 5, 4), 0.25), "axis", "target.movedim(-1, 1)"),
        (zeros(4, 9), zeros(9).long(), "axis", "prediction.T"),
        (zeros(3, 4, 5, 5), zeros(3, 1, 5, 5).long(), "shape", "target.squeeze(1)"),
        (zeros(15, 4), zeros(3, 5).long(), "shape", "target.flatten()"),
        (zeros(3, 5, 4), zeros(15).long(), "shape", "prediction.flatten(0, 1)"),
        (zeros(3, 2), label(0, 1, 2), "label-range", "target - 1"),
        (zeros(3, 2), label(0, 9, 1), "label-range", "10 outputs"),
        (zeros(3, 2), label(0, 1, -1), "label-range", "ignore_index (-100)"),
        (zeros(3, 2), label(-1, 1, -1), "label-range", "(target + 1) // 2"),
        (zeros(3, 2), label(0, 255, 1), "label-range", "ignore_index=255"),
        (zeros(2, 2), torch.tensor([[0.5, 0.5], [2.0, -1.0]]), "not-normalised", "Normalise"),
        (zeros(2, 2, dtype=torch.float64), ones(2, 2) / 2, "target-type", "target.to(prediction.dtype)"),
        (label(0, 1)[:, None].expand(2, 2), label(0, 1), "detached", "without argmax"),
        (label(0, 1), torch.randn(2, 3), "detached", "loss(prediction, target)"),
    ],
)
def test_cross_entropy_refuses(prediction: Tensor, target: Tensor, code: str, fix: str) -> None:
    with pytest.raises(LossMismatch) as caught:
        require(losses.cross_entropy(), prediction, target)
    assert fix in str(caught.value)
    assert code in errors("cross_entropy", prediction, target)


def test_a_label_out_of_range_is_shown_with_its_place() -> None:
    with pytest.raises(LossMismatch, match=r"the label 7 \(of sample 1, position \[2\]\) for 4 classes"):
        require(losses.cross_entropy(), zeros(2, 4, 3), torch.tensor([[0, 1, 2], [3, 0, 7]]))


@pytest.mark.parametrize("loss", [losses.cross_entropy(), nn.CrossEntropyLoss(), functional.cross_entropy])
@pytest.mark.parametrize(
    ("prediction", "target"),
    [
        (zeros(3, 2), label(0, 1, -100)),
        (zeros(3, 2), label(1, 1, 1)),
        (zeros(2, 4, 3), zeros(2, 3).long()),
        (zeros(2, 4, 3), torch.full((2, 4, 3), 0.25)),
        (zeros(3, 2), ones(3, 2) / 2),
        (torch.randn(5), torch.tensor(2)),
        (torch.randn(5), torch.rand(5).softmax(0)),
        (torch.randn(2, 4, 3, 3), torch.randint(4, (2, 3, 3))),
    ],
)
def test_cross_entropy_accepts(loss: Any, prediction: Tensor, target: Tensor) -> None:
    require(loss, prediction, target)
    assert severe(loss, prediction, target) == []


def test_torch_takes_bytes_as_labels_and_fallline_does_not() -> None:
    logits, target = torch.randn(8, 3), (torch.arange(8) % 3).byte()
    assert errors(nn.CrossEntropyLoss(), logits, target) == []
    assert errors("cross_entropy", logits, target) == ["target-type"]


def test_labels_that_look_like_real_numbers_call_for_a_regression() -> None:
    [found] = check("cross_entropy", torch.randn(8, 3), torch.randn(8))
    assert found.code == "target-type"
    assert "MSELoss" in found.fix


def test_one_hot_floats_are_no_indices_for_nll() -> None:
    one_hot = functional.one_hot(torch.arange(8) % 3).float()
    assert errors(nn.NLLLoss(), torch.randn(8, 3).log_softmax(1), one_hot) == ["target-coding"]
    assert errors(nn.CrossEntropyLoss(), torch.randn(8, 3), one_hot) == []
    several = check(nn.CrossEntropyLoss(), torch.randn(8, 3), torch.ones(8, 3).long())
    assert (several[0].code, "BCEWithLogitsLoss" in several[0].fix) == ("target-coding", True)


def test_several_outputs_and_one_index_call_for_a_loss_over_classes() -> None:
    found = check("binary_cross_entropy_with_logits", zeros(3, 4), label(0, 1, 3))[0]
    assert (found.severity, found.code) == ("error", "target-coding")
    assert "cross_entropy" in found.fix


def test_as_many_positions_as_classes_is_a_note_until_the_values_tell() -> None:
    target = torch.randint(6, (16, 6))
    fresh = check("cross_entropy", torch.randn(16, 6, 6), target)
    assert [(found.severity, found.code) for found in fresh] == [("note", "axis")]
    trained = 4 * functional.one_hot(target, 6).float()  # [N, T, C]
    assert [found.severity for found in check("cross_entropy", trained, target)] == ["warning"]
    assert [found.severity for found in check("cross_entropy", trained.transpose(1, 2), target)] == ["note"]


@pytest.mark.parametrize("loss", [nn.MSELoss(), nn.CrossEntropyLoss(), "huber", "binary_cross_entropy_with_logits"])
def test_an_empty_batch_is_an_error_and_under_a_sum_a_note(loss: Any) -> None:
    shape = (0, 3)
    target = torch.zeros(0).long() if isinstance(loss, nn.CrossEntropyLoss) else zeros(shape)
    assert errors(loss, zeros(shape), target) == ["empty"]
    found = check(nn.MSELoss(reduction="sum"), zeros(shape), zeros(shape))
    assert next(each.code for each in found if each.severity == "note") == "empty"
    assert [each for each in found if each.severity != "note"] == []


def test_torchs_own_losses_take_wider_and_whole_targets_with_a_warning() -> None:
    prediction = torch.randn(8, 1)
    for target in (torch.randn(8, 1).double(), torch.arange(8)[:, None]):
        assert severe(nn.MSELoss(), prediction, target) == ["target-type"]
        assert errors(nn.MSELoss(), prediction, target) == []
    assert errors(nn.BCEWithLogitsLoss(), prediction, label(*[0, 1] * 4)[:, None]) == ["target-type"]
    narrower = check(nn.MSELoss(), prediction.double(), torch.randn(8, 1))
    assert [(found.severity, found.code) for found in narrower] == [("note", "target-type")]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_against_float32_is_autocast(dtype: torch.dtype) -> None:
    assert severe("mse", torch.randn(8, 1).to(dtype), torch.randn(8, 1)) == []
    assert severe(nn.MSELoss(), torch.randn(8, 1).to(dtype), torch.randn(8, 1)) == []


@pytest.mark.parametrize("target", [torch.tensor([True, False] * 4), torch.tensor([1, 0] * 4, dtype=torch.uint8)])
def test_bytes_and_booleans_have_no_minus_one(target: Tensor) -> None:
    found = check(nn.HingeEmbeddingLoss(), torch.rand(8), target)[0]
    assert (found.severity, found.code) == ("error", "target-coding")
    assert "target.to(prediction.dtype)" in found.fix


def test_counts_and_signs_may_be_whole_numbers() -> None:
    assert severe(nn.PoissonNLLLoss(), torch.randn(64), torch.randint(5, (64,))) == []
    assert severe("hinge", torch.randn(64), 2 * torch.randint(2, (64,)) - 1) == []


def test_what_is_no_tensor_is_named() -> None:
    assert errors("mse", torch.randn(2), [1.0, 2.0]) == ["target-type"]
    assert errors("mse", 1.0, torch.randn(2)) == ["detached"]
    assert errors("triplet_margin", (torch.randn(8, 2), torch.randn(8, 2), torch.randn(8, 2)), None) == []
    assert errors(lambda p, t: p["a"].square().mean(), {"a": torch.randn(2)}, None) == []


def test_hidden_states_want_a_label_each() -> None:
    hidden, weight = torch.randn(4, 6, 8), torch.randn(20, 8)
    labels = torch.randint(20, (4, 6))
    assert severe("linear_cross_entropy", (hidden, weight), labels) == []
    assert errors("linear_cross_entropy", (hidden, weight), labels.flatten()) == ["shape"]
    assert errors("linear_cross_entropy", (hidden, weight), labels + 15) == ["label-range"]


def test_every_code_is_documented_and_every_sentence_ends() -> None:
    assert all(CODES[code].endswith(".") for code in CODES)
    cases: list[tuple[Any, Any, Any]] = [
        ("mse", zeros(3, 1), zeros(3)),
        ("cross_entropy", zeros(3, 1), label(0, 0, 0)),
        ("cross_entropy", torch.randn(64, 4).softmax(1), torch.arange(64) % 4),
        (nn.KLDivLoss(), torch.randn(8, 3).log_softmax(1), torch.rand(8, 3)),
    ]
    for case in cases:
        for found in check(*case):
            assert found.code in CODES
            assert found.seen.endswith(".")
            assert found.why.endswith(".")
            assert "\n" not in found.fix
            assert math.isfinite(len(found.fix))
