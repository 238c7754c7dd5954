"""Products of stacked matrices give the same however they are arranged, and are arranged as they should be."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn

import fallline as fl
from fallline.sweeps import products, search
from fallline.sweeps.programs import Programs
from fallline.sweeps.traced import trace
from fallline.sweeps.vectorised import Population

ATEN = torch.ops.aten
PRODUCTS = {ATEN.bmm.default: "bmm", ATEN.mm.default: "mm", products.LINEAR: "oneDNN"}
needs_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch was built without oneDNN")

# What is done with a product.
USES: dict[str, Callable[[Tensor], list[Tensor]]] = {
    "alone": lambda found: [found],
    "added to": lambda found: [found + 1],
    "transposed": lambda found: [found.transpose(1, 2) * 2],
    "both": lambda found: [found.mT + 1, found],
    "viewed": lambda found: [found.view(-1), found.mT.reshape(len(found), -1)],
    "expanded": lambda found: [found.unsqueeze(0).expand(2, *found.shape) + 1],
    "beside what is transposed": lambda found: [found * torch.ones_like(found.mT.contiguous()).mT],
    "twice transposed": lambda found: [found.mT + 1, found.transpose(2, 1) * 3],
}


def kinds(traced: fx.GraphModule) -> list[str]:
    return [PRODUCTS[node.target] for node in traced.graph.nodes if node.target in PRODUCTS]


def computing(monkeypatch: pytest.MonkeyPatch, *, onednn: bool) -> None:
    monkeypatch.setattr(products, "onednn_is_faster", lambda: onednn)
    monkeypatch.setattr(products, "WORTH_ONEDNN", 1)


@settings(max_examples=150, deadline=None)
@given(
    st.tuples(st.integers(1, 3), st.integers(1, 40), st.integers(1, 5), st.integers(1, 40)),
    st.sampled_from(sorted(USES)),
    st.tuples(*[st.sampled_from(["own", "turned", "shared", "shared and turned"])] * 2),
    st.sampled_from([torch.float32, torch.float64]),
    st.booleans(),
)
def test_arranged_products_give_the_same(
    sizes: tuple[int, int, int, int], use: str, sides: tuple[str, str], dtype: torch.dtype, onednn: bool
):
    rows, long, inner, short = sizes

    def side(kind: str, *shape: int) -> Tensor:
        made = torch.randn(*shape, dtype=dtype) if "shared" in kind else torch.randn(rows, *shape, dtype=dtype)
        return made.mT.contiguous().mT if "turned" in kind else made

    a, b = side(sides[0], long, inner), side(sides[1], inner, short)

    def product(a: Tensor, b: Tensor) -> list[Tensor]:
        return USES[use](torch.bmm(a.expand(rows, long, inner), b.expand(rows, inner, short)))

    with pytest.MonkeyPatch.context() as patch:
        computing(patch, onednn=onednn and torch.backends.mkldnn.is_available())
        traced = trace(product, a, b)
    for ours, expected in zip(traced(a, b), product(a, b), strict=True):
        assert ours.shape == expected.shape
        assert ours.dtype == dtype
        torch.testing.assert_close(ours, expected)
    assert not kinds(traced).count("oneDNN") or dtype == torch.float32


@pytest.mark.parametrize("shared", ["left", "right"])
@pytest.mark.parametrize("use", ["alone", "transposed"])
@pytest.mark.parametrize("onednn", [False, pytest.param(True, marks=needs_onednn)])
def test_a_side_that_all_trials_share_makes_one_product(
    shared: str, use: str, onednn: bool, monkeypatch: pytest.MonkeyPatch
):
    computing(monkeypatch, onednn=onednn)
    x, w = torch.randn(50, 6), torch.randn(3, 6, 40)

    def product(x: Tensor, w: Tensor) -> list[Tensor]:
        all_of_x = x.expand(3, 50, 6)
        return USES[use](torch.bmm(all_of_x, w) if shared == "left" else torch.bmm(w.mT, all_of_x.mT))

    traced = trace(product, x, w)
    assert kinds(traced) == ["oneDNN" if onednn else "mm"]
    torch.testing.assert_close(traced(x, w), product(x, w))


@needs_onednn
def test_small_products_are_left_to_blas(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(products, "onednn_is_faster", lambda: True)

    def product(x: Tensor, w: Tensor) -> Tensor:
        return torch.bmm(x.expand(len(w), *x.shape), w)

    assert kinds(trace(product, torch.randn(8, 8), torch.randn(3, 8, 8))) == ["mm"]
    assert kinds(trace(product, torch.randn(64, 64), torch.randn(8, 64, 64))) == ["oneDNN"]


def test_products_that_are_narrow_or_used_transposed_are_turned_round():
    def narrow_and_transposed(a: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        return torch.bmm(a, b) + 1, torch.bmm(a, c).transpose(1, 2) * 2

    a, b, c = torch.randn(5, 40, 30), torch.randn(5, 30, 4), torch.randn(5, 30, 50)
    traced = trace(narrow_and_transposed, a, b, c)
    torch.testing.assert_close(traced(a, b, c), narrow_and_transposed(a, b, c))
    shapes = [tuple(n.meta["val"].shape) for n in traced.graph.find_nodes(op="call_function", target=ATEN.bmm.default)]
    assert shapes == [(5, 4, 40), (5, 50, 40)], "both products should be computed as BᵀAᵀ"


def test_what_meets_an_activation_lies_as_it_does():
    def backward(slope: Tensor, weight: Tensor, activation: Tensor) -> Tensor:
        return torch.where(activation.mT > 0, torch.bmm(slope, weight), 0)

    like = torch.randn(5, 60, 50)  # in memory [trial, feature, sample]
    slope, weight = torch.randn(5, 50, 40), torch.randn(5, 40, 60)
    traced = trace(backward, slope, weight, like)
    (node,) = traced.graph.find_nodes(op="call_function", target=ATEN.bmm.default)
    assert tuple(node.meta["val"].shape) == (5, 60, 50)
    torch.testing.assert_close(traced(slope, weight, like), backward(slope, weight, like))
    plain = trace(backward, slope, weight, like.mT.contiguous().mT)
    (node,) = plain.graph.find_nodes(op="call_function", target=ATEN.bmm.default)
    assert tuple(node.meta["val"].shape) == (5, 50, 60), "nothing lies transposed there"


def population(seeds: list[int]) -> tuple[Population, Programs]:
    task = fl.tasks.digits()

    def deep() -> nn.Module:
        return nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 40), nn.Tanh(), nn.Linear(40, 10))

    task = fl.Task("deep", deep, (task.train.x, task.train.y), task.loss, batch_size=64)
    optimizers = [fl.optim.sgd(lr=fl.grid([0.1, 0.2, 0.3, 0.4]))]
    plans = search.trials(search.configurations(optimizers, [task.loss], samples=1, search_seed=0), seeds)
    programs = Programs()
    return Population(task, plans, steps=3, device=torch.device("cpu"), programs=programs), programs


@pytest.mark.parametrize("onednn", [False, pytest.param(True, marks=needs_onednn)])
def test_trials_of_one_seed_share_the_input_of_their_first_layer(onednn: bool, monkeypatch: pytest.MonkeyPatch):
    computing(monkeypatch, onednn=onednn)
    found = {}
    for seeds in ([0], [0, 1]):
        own, programs = population(seeds)
        losses = own.train_steps(3)
        found[len(seeds)] = losses[[seed == 0 for seed in own.seeds]]
        (graph,) = [program.graph for program in programs if "forward" in program.part.name]
        assert graph is not None
        shared = {"oneDNN" if onednn else "mm": 2, "bmm": 6}  # forwards, and for the gradient of its weights
        assert Counter(kinds(graph)) == (shared if len(seeds) == 1 else {"bmm": 8})
    np.testing.assert_allclose(found[1], found[2], rtol=1e-5)
    assert (found[1][:, 0] != found[1][:, 2]).all()


@pytest.mark.parametrize(
    ("capability", "cpu", "faster"),
    [("AVX512", "AuthenticAMD", True), ("AVX512", "GenuineIntel", False), ("AVX2", "AuthenticAMD", False)],
)
def test_onednn_computes_where_mkl_leaves_half_of_the_vector_unit_alone(
    capability: str, cpu: str, faster: bool, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    for backend in (torch.backends.mkl, torch.backends.mkldnn):
        monkeypatch.setattr(backend, "is_available", lambda: True)
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setattr(Path, "read_text", lambda path: f"vendor_id : {cpu}\n" if "cpuinfo" in str(path) else "")
    assert products.onednn_is_faster.__wrapped__() is faster
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert not products.onednn_is_faster.__wrapped__()
