"""What the values of a prediction, a target and of a loss's own arguments give away; and what they do not."""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from fallline import losses
from fallline.errors import LossMismatch
from fallline.losses.misuse import Finding, check, require

N = 64


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(3)


def classes(count: int = 5) -> Tensor:
    return torch.arange(N) % count


def logits(count: int = 5, size: float = 2.0) -> Tensor:
    return size * torch.randn(N, count)


def yes() -> Tensor:
    return (torch.arange(N) % 2).float()[:, None]


def said(loss: Any, prediction: Any, target: Any = None) -> list[tuple[str, str]]:
    return [(found.severity, found.code) for found in check(loss, prediction, target)]


def severe(loss: Any, prediction: Any, target: Any = None) -> list[str]:
    return [code for severity, code in said(loss, prediction, target) if severity != "note"]


def only(loss: Any, prediction: Any, target: Any = None) -> Finding:
    [found] = [each for each in check(loss, prediction, target) if each.severity != "note"]
    return found


# Softmax twice.

OVER_LOGITS = ["cross_entropy", "poly", "generalized_cross_entropy", "symmetric_cross_entropy", "focal"]


@pytest.mark.parametrize("name", OVER_LOGITS)
def test_probabilities_in_place_of_logits(name: str) -> None:
    found = only(name, logits().softmax(1), classes())
    assert (found.severity, found.code) == ("error", "double-softmax")
    assert "64 rows each sum to 1" in found.seen
    assert severe(name, logits(), classes()) == []


@pytest.mark.parametrize("loss", [nn.CrossEntropyLoss(), functional.cross_entropy, "cross_entropy"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_probabilities_in_any_precision(loss: Any, dtype: torch.dtype) -> None:
    assert severe(loss, logits(30).to(dtype).softmax(1), classes(30)) == ["double-softmax"]
    assert severe(loss, logits(30).to(dtype).softmax(1).float(), classes(30)) == ["double-softmax"]


def test_maps_of_probabilities() -> None:
    maps, target = torch.randn(2, 4, 8, 8), torch.randint(4, (2, 8, 8))
    assert severe(nn.CrossEntropyLoss(), maps.softmax(1), target) == ["double-softmax"]
    assert severe(nn.CrossEntropyLoss(), maps, target) == []


def test_one_row_is_less_evidence_than_many() -> None:
    assert said("cross_entropy", torch.randn(1, 10).softmax(1), torch.tensor([3])) == [("warning", "double-softmax")]
    assert said("cross_entropy", torch.tensor([[0.2, 0.7]]), torch.tensor([1])) == []
    in_half = torch.tensor([[0.25, 0.7656]]).bfloat16()  # the sum is 1.0156
    assert said("cross_entropy", in_half, torch.tensor([1])) == []


def test_uniform_probabilities_of_a_layer_of_zeros() -> None:
    assert said("cross_entropy", torch.zeros(N, 5).softmax(1), classes()) == [("warning", "double-softmax")]
    assert said("cross_entropy", torch.full((N, 2), 0.5), classes(2)) == []


def test_one_hot_predictions() -> None:
    one_hot = functional.one_hot(classes().roll(1), 5).float()
    assert said("cross_entropy", one_hot, classes()) == [("warning", "double-softmax")]


def test_softmax_in_front_of_a_loss_for_yes_or_no() -> None:
    target = functional.one_hot(classes(), 5).float()
    assert severe(nn.BCEWithLogitsLoss(), logits().softmax(1), target) == ["double-softmax"]


@pytest.mark.parametrize(
    "prediction",
    [
        torch.zeros(N, 5),
        torch.ones(N, 5),
        torch.full((N, 5), 0.4),
        0.4 + 0.05 * torch.randn(N, 5),
        60 * torch.rand(N, 5) - 30,
        torch.randn(N, 5).masked_fill(torch.arange(5) == 4, -math.inf),
        torch.randn(N, 5).bfloat16(),
        torch.randn(N, 5).double(),
        torch.randn(N, 5).abs(),
        torch.randn(N, 5) / 100,
        torch.randn(N, 5).relu(),
    ],
)
def test_odd_logits_are_logits(prediction: Tensor) -> None:
    assert severe(nn.CrossEntropyLoss(), prediction, classes(4)) == []


def test_log_softmax_twice_is_harmless() -> None:
    assert said("cross_entropy", logits().log_softmax(1), classes()) == [("note", "log-softmax-twice")]


# Another axis.


@pytest.mark.parametrize("axis", [0, 2, (2, 3), (0, 1, 2, 3)])
def test_softmax_over_another_axis(axis: Any) -> None:
    maps, target = torch.randn(4, 5, 6, 7), torch.randint(5, (4, 6, 7))
    wrong = maps.exp() / maps.exp().sum(axis, keepdim=True)
    found = [("error", "softmax-axis")]
    assert said(nn.CrossEntropyLoss(), wrong, target) == found
    if axis != (0, 1, 2, 3):
        assert said(nn.NLLLoss(), wrong.log(), target) == found
        assert said(nn.CrossEntropyLoss(), wrong.log(), target) == found


def test_softmax_over_the_batch() -> None:
    assert severe(nn.CrossEntropyLoss(), logits().softmax(0), classes()) == ["softmax-axis"]
    assert severe(nn.NLLLoss(), logits().log_softmax(0), classes()) == ["softmax-axis"]
    soft = functools.partial(functional.kl_div, reduction="batchmean")
    assert said(soft, logits().log_softmax(0), logits().softmax(1)) == [("error", "softmax-axis")]


def test_class_probabilities_over_another_axis() -> None:
    target = torch.randn(4, 5, 6).softmax(2)
    assert said("cross_entropy", torch.randn(4, 5, 6), target) == [("error", "axis")]
    assert severe("cross_entropy", torch.randn(4, 5, 6), torch.randn(4, 5, 6).softmax(1)) == []


# Sigmoid twice.


def test_probabilities_in_place_of_logits_of_yes() -> None:
    trained = (6 * (yes() - 0.5) + torch.randn(N, 1)).sigmoid()
    for loss in (nn.BCEWithLogitsLoss(), "binary_cross_entropy_with_logits", nn.MultiLabelSoftMarginLoss()):
        assert said(loss, trained, yes()) == [("error", "double-sigmoid")]
    assert said("dice", trained.reshape(4, 1, 4, 4), yes().reshape(4, 1, 4, 4)) == [("error", "double-sigmoid")]
    assert severe(nn.SoftMarginLoss(), trained, 2 * yes() - 1) == ["double-sigmoid"]
    assert severe("ordinal", (4 * torch.randn(N, 3)).sigmoid(), classes(4)) == ["double-sigmoid"]


@pytest.mark.parametrize(
    "prediction",
    [
        torch.tensor([[0.2], [0.9], [0.4]]),
        torch.zeros(3, 1),
    ],
)
def test_three_numbers_in_the_unit_interval_are_no_evidence(prediction: Tensor) -> None:
    assert severe(nn.BCEWithLogitsLoss(), prediction, torch.tensor([[0.0], [1.0], [1.0]])) == []


@pytest.mark.parametrize("prior", [0.405, 0.2, 0.8, 0.49])
def test_logits_about_a_prior_are_no_probabilities(prior: float) -> None:
    layer = nn.Linear(8, 1)
    nn.init.normal_(layer.weight, std=0.02)
    nn.init.constant_(layer.bias, prior)
    assert severe(nn.BCEWithLogitsLoss(), layer(torch.randn(N, 8)), yes()) == []
    if prior < 0.41:
        assert severe(nn.BCEWithLogitsLoss(), layer(torch.randn(N, 8)).detach(), yes()) == []


@pytest.mark.parametrize("bias", [True, False])
def test_fresh_probabilities_are_known_by_where_they_come_from(bias: bool) -> None:
    layer = nn.Linear(8, 1, bias=bias)
    assert said(nn.BCEWithLogitsLoss(), layer(torch.randn(N, 8)).sigmoid(), yes()) == [("error", "double-sigmoid")]
    assert severe(nn.BCEWithLogitsLoss(), layer(torch.randn(N, 8)), yes()) == []


def test_a_relu_is_no_sigmoid() -> None:
    assert severe(nn.BCEWithLogitsLoss(), (0.3 * torch.randn(N, 4)).relu(), yes().expand(N, 4)) == []


def test_a_sigmoid_in_front_of_a_softmax() -> None:
    assert severe("cross_entropy", logits(4, 3.0).sigmoid(), classes(4)) == ["double-sigmoid"]


# Probabilities and log-probabilities.


@pytest.mark.parametrize(
    ("prediction", "word"),
    [(torch.randn(N, 1), "logits"), (torch.randn(N, 1).sigmoid().log(), "log-probabilities")],
)
def test_bce_wants_probabilities(prediction: Tensor, word: str) -> None:
    found = only("binary_cross_entropy", prediction, yes())
    assert (found.severity, found.code) == ("error", "not-probabilities")
    assert word in found.why
    assert severe(nn.BCELoss(), prediction, yes()) == ["not-probabilities"]
    assert severe(nn.BCELoss(), torch.tensor([0.0, 1.0, 0.5]), torch.tensor([0.0, 1.0, 1.0])) == []


@pytest.mark.parametrize("name", ["nll", "NLLLoss"])
def test_nll_wants_log_probabilities(name: str) -> None:
    loss = getattr(nn, name)() if name[0] == "N" else name
    assert severe(loss, logits().log_softmax(1), classes()) == []
    assert severe(loss, logits().bfloat16().log_softmax(1).float(), classes()) == []
    assert severe(loss, (logits().softmax(1) + 1e-6).log(), classes()) == []
    assert severe(loss, logits().log_softmax(1).masked_fill(torch.arange(5) == 4, -math.inf), classes(4)) == []
    bad = [logits(), logits().softmax(1), -logits().log_softmax(1), -logits().abs()]
    severities = []
    for prediction in bad:
        found = only(loss, prediction, classes())
        assert found.code == "not-log-probabilities"
        severities.append(found.severity)
    assert severities == ["error", "error", "error", "warning"]


def test_kl_div_wants_log_probabilities_and_probabilities() -> None:
    loss = nn.KLDivLoss(reduction="batchmean")
    log, target = logits().log_softmax(1), logits().softmax(1)
    assert severe(loss, log, target) == []
    assert severe(nn.KLDivLoss(reduction="batchmean", log_target=True), log, target.log()) == []
    maps = torch.randn(4, 2, 5, 5)
    space = maps.flatten(1).log_softmax(1).reshape_as(maps)
    assert severe(loss, space, space.exp().flip(0)) == []
    assert said(loss, logits(), target) == [("error", "not-log-probabilities")]
    assert said(loss, logits().softmax(1), target) == [("error", "not-log-probabilities")]
    assert said(loss, -logits().abs(), target) == [("warning", "not-log-probabilities")]
    assert said(loss, log, target.log()) == [("error", "not-probabilities")]
    assert said(loss, log, logits()) == [("error", "not-probabilities")]
    assert said(loss, log, 2 * target) == [("warning", "not-normalised")]
    of_logs = nn.KLDivLoss(reduction="batchmean", log_target=True)
    assert said(of_logs, log, target) == [("error", "not-log-probabilities")]


def test_ctc_wants_log_probabilities_and_no_blank() -> None:
    spoken, targets = torch.randn(4, 12, 6), torch.randint(1, 6, (4, 3))
    lengths = (torch.full((4,), 12), torch.full((4,), 3))
    assert severe("ctc", spoken.log_softmax(-1), targets) == []
    assert severe("ctc", spoken, targets) == ["not-log-probabilities"]
    assert severe("ctc", spoken.log_softmax(-1), 0 * targets) == ["label-range"]
    frames_first = spoken.log_softmax(-1).transpose(0, 1)
    assert severe(nn.CTCLoss(), (frames_first, lengths[0]), (targets, lengths[1])) == []
    assert severe(nn.CTCLoss(), (frames_first, lengths[0]), (targets + 3, lengths[1])) == ["label-range"]
    short = (torch.full((4,), 2), torch.full((4,), 3))
    assert said(nn.CTCLoss(), (frames_first, short[0]), (targets, short[1])) == [("warning", "not-finite")]


# Domains.


def test_what_must_be_positive() -> None:
    counts = torch.poisson(torch.full((N, 1), 3.0))
    assert severe(nn.PoissonNLLLoss(log_input=False), torch.rand(N, 1), counts) == []
    wrong = [("error", "domain")]
    assert said(nn.PoissonNLLLoss(log_input=False), torch.randn(N, 1), counts) == wrong
    assert said(nn.PoissonNLLLoss(), torch.randn(N, 1), -counts) == wrong
    assert said("tweedie", torch.randn(N, 1), torch.randn(N, 1)) == wrong
    assert said("poisson_nll", torch.full((N, 1), 100.0), counts) == wrong
    rates = counts + 3 + torch.rand(N, 1)  # and not their logarithms
    assert said(nn.PoissonNLLLoss(), rates, counts + 3) == [("warning", "domain")]
    assert severe(nn.PoissonNLLLoss(), (counts + 3).log(), counts + 3) == []


@pytest.mark.parametrize("name", ["gaussian_nll", "beta_nll", "crps"])
def test_a_variance_or_scale_is_positive(name: str) -> None:
    mean, target = torch.randn(N, 1), torch.randn(N, 1)
    parts = (mean, torch.rand(N, 1) + 0.1)
    assert severe(name, parts, target) == []
    found = only(name, (mean, torch.randn(N, 1)), target)
    assert (found.severity, found.code) == ("error", "domain")
    switch = "log_scale" if name == "crps" else "log_variance"
    assert severe(losses.get(name)(**{switch: True}), (mean, torch.randn(N, 1)), target) == []
    assert severe(name, torch.cat([mean, -parts[1]], 1), target) == ["domain"]


def test_torchs_gaussian_nll_too() -> None:
    mean, target = torch.randn(N, 1), torch.randn(N, 1)
    assert severe(nn.GaussianNLLLoss(), (mean, torch.rand(N, 1)), target) == []
    assert severe(functional.gaussian_nll_loss, (mean, torch.randn(N, 1)), target) == ["domain"]


def test_a_distance_is_not_negative() -> None:
    signs = 2 * yes() - 1
    assert severe(nn.HingeEmbeddingLoss(), torch.rand(N, 1), signs) == []
    assert said(nn.HingeEmbeddingLoss(), torch.randn(N, 1), signs) == [("warning", "domain")]


# Codings of targets.


@pytest.mark.parametrize(
    ("target", "fix"),
    [
        (2 * yes() - 1, "(target + 1) / 2"),
        (255 * yes(), "target / 255"),
        (1 + yes(), "target - 1"),
        ((torch.arange(N) % 7).float()[:, None], "CrossEntropyLoss"),
        (torch.rand(N, 1) * 80, "mse"),
    ],
)
def test_binary_cross_entropy_wants_zero_to_one(target: Tensor, fix: str) -> None:
    with pytest.raises(LossMismatch) as caught:
        require("binary_cross_entropy_with_logits", torch.randn(N, 1), target)
    assert fix in str(caught.value)
    assert said(nn.BCEWithLogitsLoss(), torch.randn(N, 1), target)[0] == ("error", "target-coding")


@pytest.mark.parametrize(
    ("prediction", "target", "fix"),
    [
        (torch.zeros(3, 1), torch.tensor([[-1.0], [1.0], [1.0]]), "(target + 1) / 2"),
        (torch.zeros(3, 1), torch.tensor([[0.0], [2.0], [1.0]]), "0 for no and 1 for yes"),
    ],
)
def test_binary_cross_entropy_refuses(prediction: Tensor, target: Tensor, fix: str) -> None:
    with pytest.raises(LossMismatch) as caught:
        require("binary_cross_entropy_with_logits", prediction, target)
    assert fix in str(caught.value)


@pytest.mark.parametrize("target", [yes(), 0.1 + 0.8 * yes(), torch.rand(N, 1), torch.ones(N, 1), torch.zeros(N, 1)])
def test_soft_and_one_sided_targets_of_yes_are_fine(target: Tensor) -> None:
    assert severe(nn.BCEWithLogitsLoss(), torch.randn(N, 1), target) == []


@pytest.mark.parametrize("name", ["hinge", "squared_hinge", "soft_margin", "hinge_embedding", "margin_ranking"])
def test_signs_in_place_of_zero_and_one(name: str) -> None:
    prediction: Any = torch.rand(N, 1) * 3
    if name == "margin_ranking":
        prediction = (torch.randn(N, 1), torch.randn(N, 1))
    found = only(name, prediction, yes())
    assert (found.severity, found.code, found.fix) == ("error", "target-coding", "target = 2 * target - 1")
    assert severe(name, prediction, 2 * yes() - 1) == []
    assert said(name, prediction, 3 * yes() - 1)[0] == ("error", "target-coding")


def test_sets_of_classes_are_no_rows_of_ones() -> None:
    scores = torch.randn(4, 4)
    assert severe(nn.MultiLabelMarginLoss(), scores, torch.tensor([[3, 0, -1, 1]] * 4)) == []
    assert said(nn.MultiLabelMarginLoss(), scores, torch.tensor([[0, 1, 1, 0]] * 4)) == [("error", "target-coding")]
    assert said(nn.MultiLabelMarginLoss(), scores, torch.tensor([[0, 7, -1, -1]] * 4)) == [("error", "label-range")]
    assert said(nn.MultiLabelMarginLoss(), scores, torch.arange(4)) == [("error", "shape")]


def test_ranks_count_from_zero() -> None:
    thresholds = torch.randn(N, 3)
    assert severe("ordinal", thresholds, classes(4)) == []
    assert said("ordinal", thresholds, classes(4) + 1) == [("error", "label-range")]
    assert said("ordinal", thresholds, classes(4) - 1) == [("error", "label-range")]


def test_masks_for_overlaps() -> None:
    maps, mask = torch.randn(4, 3, 8, 8), torch.randint(3, (4, 8, 8))
    assert severe("dice", maps, mask) == []
    assert severe("dice", maps[:, :1], (mask[:, None] > 0).float()) == []
    assert severe("dice", maps[:, :1], (mask[:, None] > 0).long()) == []
    assert said("dice", maps[:, :1], 255.0 * (mask[:, None] > 0)) == [("error", "target-coding")]
    assert said("dice", maps, mask + 1) == [("error", "label-range")]
    assert said("dice", maps[:, :1], 2 * (mask[:, None] > 0).long()) == [("error", "label-range")]
    assert severe("dice", maps.softmax(1), mask) == ["double-softmax"]


# Distributions over classes.


@pytest.mark.parametrize(
    "target",
    [
        functional.one_hot(torch.arange(N) % 5, 5).float(),
        0.9 * functional.one_hot(torch.arange(N) % 5, 5) + 0.02,
        torch.randn(N, 5).softmax(1),
        torch.randn(N, 5).bfloat16().softmax(1).float(),
        functional.one_hot(torch.arange(N) % 5, 5).float() * (torch.arange(N)[:, None] > 3),  # masked rows
    ],
)
def test_soft_labels_are_fine(target: Tensor) -> None:
    assert severe("cross_entropy", logits(), target) == []


def test_soft_labels_sum_to_one() -> None:
    assert said("cross_entropy", logits(), torch.rand(N, 5)) == [("warning", "not-normalised")]
    several = only("cross_entropy", logits(), (torch.rand(N, 5) < 0.6).float())
    assert (several.code, "BCEWithLogitsLoss" in several.fix) == ("not-normalised", True)
    assert said("cross_entropy", logits(), logits()) == [("error", "not-normalised")]
    assert said("cross_entropy", logits(), 100 * logits().softmax(1)) == [("error", "not-normalised")]
    assert only("cross_entropy", logits(), logits().log_softmax(1)).fix == "target = target.exp()"


# Ignored, rare and constant.


def test_everything_ignored() -> None:
    ignored = torch.full((N,), -100)
    assert said(nn.CrossEntropyLoss(), logits(), ignored) == [("error", "all-ignored")]
    assert said("cross_entropy", logits(), ignored) == [("warning", "all-ignored")]
    ignored[0] = 1
    assert severe(nn.CrossEntropyLoss(), logits(), ignored) == []


def test_a_class_that_is_ignored() -> None:
    assert said(nn.CrossEntropyLoss(ignore_index=2), logits(), classes()) == [("warning", "ignored-class")]
    assert severe(nn.CrossEntropyLoss(ignore_index=255), logits(), classes()) == []
    assert severe(nn.CrossEntropyLoss(ignore_index=4), logits(), classes(4)) == []
    rare = torch.zeros(N).long()
    rare[:2] = 1
    assert said(functools.partial(functional.cross_entropy), logits(), rare) == [("note", "imbalance")]
    assert said("multi_margin", logits(), rare) == [("note", "imbalance")]  # which ignores nothing
    words = nn.CrossEntropyLoss(ignore_index=0)  # padding
    assert said(words, torch.randn(N, 50), torch.arange(N) % 50) == [("note", "ignored-class")]
    assert severe(words, torch.randn(8, 5, 12), torch.randint(5, (8, 12))) == []


def test_a_rare_class_is_a_note() -> None:
    rare = torch.zeros(N).long()
    rare[:2] = 1
    assert said("cross_entropy", logits(2), rare) == [("note", "imbalance")]
    assert said(nn.CrossEntropyLoss(weight=torch.tensor([0.1, 1.0])), logits(2), rare) == []
    assert said(nn.BCEWithLogitsLoss(), torch.randn(N, 1), rare.float()[:, None]) == [("note", "imbalance")]
    assert said(nn.BCEWithLogitsLoss(pos_weight=torch.tensor(30.0)), torch.randn(N, 1), rare.float()[:, None]) == []
    assert said("cross_entropy", logits(2), classes(2)) == []
    assert said("cross_entropy", logits(2)[:20], rare[:20]) == []


def test_constant_targets_are_a_note() -> None:
    assert said("mse", torch.randn(N, 1), torch.zeros(N, 1)) == [("note", "constant-target")]
    assert said("cross_entropy", logits(), torch.ones(N).long()) == [("note", "constant-target")]
    assert said("cross_entropy", logits()[:1], torch.ones(1).long()) == []
    assert severe("supervised_contrastive", torch.randn(N, 8), torch.arange(N)) == ["constant-target"]
    assert severe("supervised_contrastive", torch.randn(N, 8), classes()) == []


@pytest.mark.parametrize(
    ("size", "severity"),
    [(250_000.0, "warning"), (30.0, "note"), (3.0, ""), (0.1, ""), (1e-3, "note"), (1e-6, "warning")],
)
def test_the_scale_of_targets(size: float, severity: str) -> None:
    found = said(nn.MSELoss(), 0.3 * torch.randn(N, 1), size * torch.randn(N, 1))
    assert found == ([(severity, "scale")] if severity else [])


def test_a_model_that_knows_the_scale_is_left_alone() -> None:
    target = 250 + 80 * torch.randn(N, 1)
    assert said("mse", target + 20 * torch.randn(N, 1), target) == []


# The loss's own arguments.


def test_class_weights_fit_the_classes() -> None:
    require(losses.cross_entropy(weight=[1.0, 2.0]), torch.zeros(3, 2), torch.tensor([0, 1, 1]))
    with pytest.raises(LossMismatch, match=r"class weights of shape \[3\] for 2 classes"):
        require(losses.cross_entropy(weight=[1.0, 2.0, 3.0]), torch.zeros(3, 2), torch.tensor([0, 1, 1]))
    require(losses.cross_entropy(ignore_index=255), torch.zeros(3, 2), torch.tensor([0, 1, 255]))
    with pytest.raises(LossMismatch, match="label 255"):
        require(losses.cross_entropy(), torch.zeros(3, 2), torch.tensor([0, 1, 255]))
    bound = functools.partial(functional.cross_entropy, weight=torch.ones(3))
    assert severe(bound, logits(), classes()) == ["class-weights"]


def test_binary_cross_entropy_checks_its_weights_against_the_outputs() -> None:
    each = losses.binary_cross_entropy_with_logits(pos_weight=torch.tensor([1.0, 2.0]))
    require(each, torch.zeros(3, 2), torch.ones(3, 2))
    with pytest.raises(LossMismatch, match="pos_weight of shape"):
        require(each, torch.zeros(3, 4), torch.ones(3, 4))
    weighted = losses.binary_cross_entropy_with_logits(weight=torch.ones(3, 3, 3))
    with pytest.raises(LossMismatch, match="does not broadcast"):
        require(weighted, torch.zeros(3, 3), torch.ones(3, 3))
    maps = nn.BCEWithLogitsLoss(pos_weight=torch.ones(3, 1, 1))
    assert severe(maps, torch.randn(2, 3, 4, 4), torch.ones(2, 3, 4, 4)) == []
    assert said(nn.BCEWithLogitsLoss(pos_weight=torch.ones(4)), torch.randn(N, 3), torch.ones(N, 3))[0] == (
        "error",
        "class-weights",
    )
    for bad in (-1.0, math.inf):
        weighted = nn.BCEWithLogitsLoss(pos_weight=torch.tensor([bad]))
        assert said(weighted, torch.randn(N, 1), yes()) == [("error", "class-weights")]
    never = nn.BCEWithLogitsLoss(pos_weight=torch.tensor([0.0]))
    assert severe(never, torch.randn(N, 1), yes()) == ["class-weights"]


@pytest.mark.parametrize(
    ("weight", "severity"),
    [
        ([1.0, 0.0, 1.0], "warning"),
        ([1.0, -1.0, 1.0], "error"),
        ([1.0, math.inf, 1.0], "error"),
        ([1.0, math.nan, 1.0], "error"),
        ([0.0, 0.0, 0.0], "error"),
    ],
)
def test_weights_that_mean_nothing(weight: list[float], severity: str) -> None:
    found = said(nn.CrossEntropyLoss(weight=torch.tensor(weight)), logits(3), classes(3))
    assert (severity, "class-weights") in found
    assert severe(nn.CrossEntropyLoss(weight=torch.tensor([1.0, 0.0, 1.0])), logits(3), 2 * classes(2)) == []


def test_weights_of_another_type_than_the_prediction() -> None:
    loss = nn.CrossEntropyLoss(weight=torch.ones(3))
    assert severe(loss, logits(3).double(), classes(3)) == ["class-weights"]
    assert severe(loss.double(), logits(3).double(), classes(3)) == []


def test_reductions() -> None:
    log, target = logits().log_softmax(1), logits().softmax(1)
    assert said(nn.KLDivLoss(), log, target) == [("warning", "reduction")]
    assert said(functional.kl_div, log, target) == [("warning", "reduction")]
    assert said(losses.kl_div(), log, target) == []
    assert said(losses.kl_div(reduction="mean"), log, target) == [("warning", "reduction")]
    assert said(nn.MSELoss(reduction="sum"), torch.randn(N, 1), torch.randn(N, 1)) == [("note", "reduction")]
    words = torch.randn(4, 6, 5)
    batchmean = nn.KLDivLoss(reduction="batchmean")
    assert said(batchmean, words.log_softmax(-1), words.softmax(-1).flip(0)) == [("note", "reduction")]
    assert said(nn.MSELoss(reduction="none"), torch.randn(N, 1), torch.randn(N, 1)) == []


# Vectors.


def test_collapsed_embeddings() -> None:
    first, second = torch.randn(N, 8), torch.randn(N, 8)
    signs = 2 * yes().squeeze() - 1
    assert severe(nn.CosineEmbeddingLoss(), (first, second), signs) == []
    assert severe(nn.CosineEmbeddingLoss(), (first, first), signs) == ["collapsed"]
    assert severe(nn.CosineEmbeddingLoss(), (first, 0 * second), signs) == ["collapsed"]
    assert severe(nn.CosineEmbeddingLoss(), (first, second[:1].expand(N, 8)), signs) == ["collapsed"]
    some = second.clone()
    some[3] = 0
    assert severe(nn.CosineEmbeddingLoss(), (first, some), signs) == ["collapsed"]
    sparse = second * (torch.rand(N, 8) < 0.6) + 0.1 * torch.eye(8)[torch.arange(N) % 8]
    assert severe("info_nce", (first, sparse)) == []


def test_two_scores_that_are_the_same() -> None:
    scores, signs = torch.randn(2, N), torch.ones(N)
    assert severe("margin_ranking", (scores[0], scores[1]), signs) == []
    assert severe("margin_ranking", (scores[0], scores[0]), signs) == ["collapsed"]


def test_triplets_of_the_same_tensor() -> None:
    anchor, positive, negative = torch.randn(3, N, 8)
    assert severe(nn.TripletMarginLoss(), (anchor, positive, negative)) == []
    found = only(nn.TripletMarginLoss(), (anchor, anchor, negative))
    assert (found.code, "anchor and as positive" in found.seen) == ("collapsed", True)


def test_one_output_for_all_classes() -> None:
    assert severe("cross_entropy", torch.randn(N, 1).expand(N, 4), classes(4)) == ["collapsed"]
    assert severe("cross_entropy", torch.full((N, 4), 0.3), classes(4)) == []
