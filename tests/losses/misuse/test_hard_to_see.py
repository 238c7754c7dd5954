"""What an independent tester found missed: few samples, arguments in each other's place, labels for nothing, fixes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from fallline import losses
from fallline.losses.misuse import Finding, check

N = 64


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(5)


def severe(loss: Any, prediction: Any, target: Any = None, model: nn.Module | None = None) -> list[tuple[str, str]]:
    return [(each.severity, each.code) for each in check(loss, prediction, target, model) if each.severity != "note"]


def only(loss: Any, prediction: Any, target: Any, model: nn.Module | None = None) -> Finding:
    [found] = check(loss, prediction, target, model)
    return found


def yes(count: int = N) -> Tensor:
    return (torch.arange(count) % 2).float()[:, None]


def grown(*shape: int) -> Tensor:
    return torch.randn(*shape, requires_grad=True)


@pytest.mark.parametrize("count", [1, 2, 4, 7])
def test_a_few_targets_are_out_of_scale_by_a_factor_of_a_thousand_only(count: int) -> None:
    assert severe(nn.MSELoss(), grown(count, 1), torch.full((count, 1), 3e5)) == [("warning", "scale")]
    assert severe(nn.MSELoss(), grown(count, 1), torch.full((count, 1), 150.0)) == []


@pytest.mark.parametrize("count", [2, 4, 8, 12])
def test_a_few_probabilities_are_known_by_their_graph_alone(count: int) -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1), nn.Sigmoid())
    made = model(torch.randn(count, 4))
    assert severe(nn.BCEWithLogitsLoss(), made, yes(count)) == [("warning", "double-sigmoid")]
    assert severe(nn.BCEWithLogitsLoss(), made.detach(), yes(count)) == []


def test_labels_in_the_place_of_the_prediction() -> None:
    probabilities = grown(N, 1).sigmoid()
    found = only(functional.binary_cross_entropy, yes(), probabilities)
    assert (found.severity, found.code) == ("error", "swapped")
    assert found.fix == "prediction, target = target, prediction"
    labels = torch.arange(N) % 5
    assert severe(nn.CrossEntropyLoss(), labels, grown(N, 5)) == [("error", "swapped")]
    assert severe(functional.binary_cross_entropy, probabilities, yes()) == []


def test_what_may_be_turned_round_is_not_called_swapped() -> None:
    teacher = torch.randn(N, 5).log_softmax(1)
    reverse = grown(N, 5).softmax(1)
    assert severe(nn.KLDivLoss(reduction="batchmean"), teacher, reverse) == []
    assert severe(nn.MSELoss(), torch.randn(N, 1), grown(N, 1)) == []
    coded = (grown(N, 1).sigmoid() > 0.5).float() + 0 * grown(N, 1)
    assert ("error", "swapped") not in severe(nn.BCELoss(), coded, grown(N, 1).sigmoid())


def test_a_softmax_of_one_output_as_a_probability_is_one_class() -> None:
    assert severe(nn.BCELoss(), grown(N, 1).softmax(1), yes())[0] == ("error", "one-class")
    assert severe(nn.BCELoss(), torch.ones(N, 1), torch.ones(N, 1)) == []


@pytest.mark.parametrize("name", ["triplet_margin", "info_nce", "siglip"])
def test_labels_of_which_a_loss_takes_no_notice(name: str) -> None:
    loss = getattr(losses, name)()
    outputs = grown(N, 6)
    assert ("warning", "ignored-target") in severe(loss, outputs, torch.arange(N) % 6)
    for harmless in (torch.arange(N), torch.zeros(N), torch.zeros(N).long(), torch.arange(N) % 3, None):
        assert "ignored-target" not in [code for _, code in severe(loss, outputs, harmless)]
    assert "ignored-target" not in [code for _, code in severe(loss, grown(6, 6), torch.arange(6))]
    assert "ignored-target" not in [code for _, code in severe(loss, grown(N, 1), torch.zeros(N).long())]


def test_only_the_weights_that_are_wrong_are_listed() -> None:
    weight = torch.tensor([0.2] * 9 + [-1.0])
    found = only(nn.CrossEntropyLoss(weight=weight), grown(N, 10), torch.arange(N) % 10)
    assert found.code == "class-weights"
    assert "weight[9] = -1." in found.seen
    assert "0.2" not in found.seen
    weight[9] = torch.inf
    found = only(nn.NLLLoss(weight=weight), grown(N, 10).log_softmax(1), torch.arange(N) % 10)
    assert found.seen == "NLLLoss was given weight[9] = inf."
    mended = eval(found.fix.removeprefix("weight = ").split("  #")[0], {"torch": torch, "weight": weight})
    assert severe(nn.NLLLoss(weight=mended), grown(N, 10).log_softmax(1), torch.arange(N) % 10) == []


@pytest.mark.parametrize("target", [torch.zeros(N).long(), torch.arange(N) % 2, yes()])
def test_the_fix_of_a_single_class_mends_it(target: Tensor) -> None:
    prediction = grown(N, 1)
    found = check(nn.CrossEntropyLoss(), prediction, target)[0]
    assert found.code == "one-class"
    scope: dict[str, Any] = {"torch": torch, "prediction": prediction, "target": target}
    exec(found.fix, scope)
    assert severe(scope["loss"], prediction, scope["target"]) == []


def test_nearly_all_is_not_all() -> None:
    target = torch.zeros(8192, 1)
    target[:21] = 1
    found = only(nn.BCEWithLogitsLoss(), grown(8192, 1), target)
    assert "8171 targets out of 8192 (99.74%)" in found.seen


def test_fixes_of_what_rests_or_is_rounded() -> None:
    model = nn.Sequential(nn.Linear(4, 1))
    rounded = check(nn.MSELoss(), 10 * model(torch.randn(N, 4)).detach().round() + 0 * model(torch.randn(N, 4)), yes())
    assert "fails" not in [found.code for found in rounded]
    outputs = (10 * model(torch.randn(N, 4))).round()
    found = check(nn.MSELoss(), outputs, 10 * torch.randn(N, 1), model)[0]
    assert found.code == "zero-gradient"
    assert "without round" in found.fix
    deep = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
    found = check(nn.MSELoss(), deep[1](torch.randn(N, 4)), torch.randn(N, 1), deep)[0]
    compile(found.fix, "fix", "exec")
    assert found.fix.startswith("model.get_parameter('0.weight')")


def test_messages_hold_no_tensors_and_end_in_full_stops() -> None:
    lengths = torch.full((4,), 10)
    frames = grown(10, 4, 6).log_softmax(2)
    found = check(nn.CTCLoss(), frames, (torch.ones(4, 5).long(), lengths, torch.full((4,), 5)))[0]
    assert found.code == "fails"
    assert "tensor([" not in found.seen
    unknown = check(lambda p, t: p.nonsense, grown(N, 1), torch.randn(N, 1))[0]
    assert unknown.seen.endswith("'nonsense'.")
