"""Batched functions against torch's own modules, one model at a time: values, gradients and second derivatives."""

import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from fallline.errors import Unsupported
from fallline.sweeps.batched import Batched
from fallline.sweeps.batched_convolution import Convolution, convolution, convolution_backward, convolve
from fallline.sweeps.interception import in_parts

TRIALS = 3
EXACT = {"rtol": 1e-9, "atol": 1e-10}


class Attention(nn.Module):
    """Self-attention, called as the arguments say."""

    def __init__(self, **call):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.call = call

    def forward(self, x):
        return self.attention(x, x, x, **self.call)[0]


class Applied(nn.Module):
    """A linear layer, and a function of its output."""

    def __init__(self, function, features=8):
        super().__init__()
        self.linear = nn.Linear(features, features)
        self.function = function

    def forward(self, x):
        return self.function(self.linear(x))


class Cell(nn.Module):
    """A recurrent cell run over the time steps."""

    def __init__(self, cell):
        super().__init__()
        self.cell = cell

    def forward(self, x):
        state = None
        for step in x:
            state = self.cell(step, state)
        return state


class Started(nn.Module):
    """A recurrent layer that is given its first state."""

    def __init__(self, layer, *state):
        super().__init__()
        self.layer = layer
        self.state = state

    def forward(self, x):
        return self.layer(x, self.state if len(self.state) > 1 else self.state[0])


class Bilinear(nn.Module):
    def __init__(self, **arguments):
        super().__init__()
        self.bilinear = nn.Bilinear(8, 8, 3, **arguments)

    def forward(self, x):
        return self.bilinear(x, x.flip(0))


def normal(*shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(len(shape)))


TOKENS = torch.tensor([[0, 1, 2, 2], [3, 4, 5, 0], [6, 6, 6, 6]])
SEQUENCES = normal(5, 4, 8)
FLOAT_MASK = normal(4, 4)
BOOL_MASK = FLOAT_MASK > -0.3
BOOL_MASK[1] = False


BLIND_MASK = torch.where(BOOL_MASK, FLOAT_MASK, -torch.inf)


def attended(**call):
    return lambda: Applied(
        lambda y: functional.scaled_dot_product_attention(y[:, None], y[:, None], y[:, None], **call)
    )


def grouped_heads():
    return Applied(
        lambda y: functional.scaled_dot_product_attention(
            y.unflatten(-1, (4, 2)).transpose(1, 2), y[:, None, :, :2], y[:, None, :, 2:4], enable_gqa=True
        )
    )


CONVOLUTIONS = {
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1), normal(5, 4, 9)),
    "conv1d of even kernel, same": (lambda: nn.Conv1d(4, 6, 4, padding="same", dilation=3), normal(5, 4, 9)),
    "conv2d": (lambda: nn.Conv2d(4, 6, (3, 2), padding=(2, 1), bias=False), normal(5, 4, 7, 6)),
    "conv2d of one channel": (lambda: nn.Conv2d(1, 6, 3, padding=1), normal(5, 1, 7, 6)),
    "conv2d valid": (lambda: nn.Conv2d(4, 6, 3, padding="valid"), normal(5, 4, 7, 6)),
    "conv2d same": (lambda: nn.Conv2d(4, 4, (3, 4), padding="same"), normal(5, 4, 7, 6)),
    "conv2d reflecting": (lambda: nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"), normal(5, 4, 7, 6)),
    "depthwise": (lambda: nn.Conv2d(4, 8, 3, groups=4, dilation=2), normal(5, 4, 7, 6)),
    "conv2d of one image": (lambda: nn.Conv2d(4, 6, 3), normal(4, 7, 6)),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2, stride=(1, 2, 1)), normal(2, 2, 4, 5, 3)),
    "transposed 1d": (lambda: nn.ConvTranspose1d(4, 6, 3, stride=2, dilation=2), normal(5, 4, 6)),
    "transposed 2d": (
        lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2),
        normal(2, 4, 5, 4),
    ),
    "transposed 3d": (lambda: nn.ConvTranspose3d(2, 3, 2), normal(2, 2, 3, 3, 2)),
}
RECURRENT = {
    "lstm": (lambda: nn.LSTM(8, 3), SEQUENCES),
    "lstm of one sequence": (lambda: nn.LSTM(8, 3), normal(5, 8)),
    "deep lstm": (lambda: nn.LSTM(8, 3, num_layers=2, bidirectional=True, batch_first=True), SEQUENCES),
    "projected lstm": (lambda: nn.LSTM(8, 3, num_layers=2, proj_size=2, bias=False, bidirectional=True), SEQUENCES),
    "started lstm": (lambda: Started(nn.LSTM(8, 3), normal(1, 4, 3), normal(1, 4, 3) + 1), SEQUENCES),
    "gru": (lambda: nn.GRU(8, 3, num_layers=2, batch_first=True), SEQUENCES),
    "started gru": (lambda: Started(nn.GRU(8, 3, bidirectional=True, bias=False), normal(2, 4, 3)), SEQUENCES),
    "rnn": (lambda: nn.RNN(8, 3, bidirectional=True), SEQUENCES),
    "relu rnn": (lambda: nn.RNN(8, 3, nonlinearity="relu", num_layers=2), SEQUENCES),
    "lstm cell": (lambda: Cell(nn.LSTMCell(8, 3)), SEQUENCES),
    "gru cell": (lambda: Cell(nn.GRUCell(8, 3)), SEQUENCES),
    "rnn cell": (lambda: Cell(nn.RNNCell(8, 3, bias=False)), SEQUENCES),
    "relu cell": (lambda: Cell(nn.RNNCell(8, 3, nonlinearity="relu")), SEQUENCES),
}
ATTENTION = {
    "plain": (attended(), SEQUENCES),
    "causal": (attended(is_causal=True, scale=0.7), SEQUENCES),
    "boolean mask": (attended(attn_mask=BOOL_MASK), SEQUENCES),
    "float mask": (attended(attn_mask=FLOAT_MASK), SEQUENCES),
    "float mask that hides all": (attended(attn_mask=BLIND_MASK), SEQUENCES),
    "grouped heads": (grouped_heads, SEQUENCES),
    "heads with weights": (Attention, SEQUENCES),
    "heads": (lambda: Attention(need_weights=False), SEQUENCES),
    "heads, causal": (
        lambda: Attention(need_weights=False, attn_mask=~torch.ones(4, 4).tril().bool(), is_causal=True),
        SEQUENCES,
    ),
    "heads, padded": (lambda: Attention(key_padding_mask=torch.arange(4).expand(5, 4) > 2), SEQUENCES),
    "transformer": (lambda: nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True), SEQUENCES),
}
OTHERS = {
    "bilinear": (Bilinear, SEQUENCES),
    "bilinear without bias": (lambda: Bilinear(bias=False), SEQUENCES),
    "embedding": (lambda: nn.Embedding(7, 3, padding_idx=6), TOKENS),
    "embedding by frequency": (lambda: nn.Embedding(7, 3, scale_grad_by_freq=True), TOKENS),
    "bag of sums": (lambda: nn.EmbeddingBag(7, 3, mode="sum"), TOKENS),
    "bag of means": (lambda: nn.EmbeddingBag(7, 3), TOKENS),
    "bag of maxima": (lambda: nn.EmbeddingBag(7, 3, mode="max"), TOKENS),
    "layer norm": (lambda: Applied(nn.LayerNorm(8)), SEQUENCES),
    "rms norm": (lambda: Applied(nn.RMSNorm(8)), SEQUENCES),
    "group norm": (lambda: Applied(nn.GroupNorm(2, 4)), SEQUENCES),
    "instance norm": (lambda: Applied(nn.InstanceNorm1d(4, affine=True)), SEQUENCES),
    "batch norm": (lambda: Applied(nn.BatchNorm1d(4)), SEQUENCES),
    "batch norm, not affine": (lambda: Applied(nn.BatchNorm1d(4, affine=False, momentum=0.3)), SEQUENCES),
    "batch norm, not tracking": (lambda: Applied(nn.BatchNorm1d(4, track_running_stats=False)), SEQUENCES),
    "batch norm 2d": (
        lambda: nn.Sequential(nn.Conv2d(4, 3, 2), nn.BatchNorm2d(3), nn.MaxPool2d(2), nn.AdaptiveAvgPool2d(1)),
        normal(5, 4, 7, 6),
    ),
    "batch norm 3d": (lambda: nn.Sequential(nn.Conv3d(2, 3, 2), nn.BatchNorm3d(3)), normal(2, 2, 4, 4, 3)),
    "up and down": (
        lambda: nn.Sequential(nn.Conv2d(4, 3, 2), nn.Upsample(scale_factor=2, mode="bilinear"), nn.AvgPool2d(3)),
        normal(5, 4, 7, 6),
    ),
}
MODELS = {**CONVOLUTIONS, **RECURRENT, **ATTENTION, **OTHERS}
# The max of a bag and relu have no curvature of their own, but their second derivatives exist almost everywhere.
SMOOTH = {**CONVOLUTIONS, **RECURRENT, **ATTENTION}


def flat(outputs):
    """All outputs of a module in one vector."""
    if isinstance(outputs, torch.Tensor):
        return outputs.flatten()
    return torch.cat([flat(each) for each in outputs if each is not None])


def population(make):
    """Models, their parameters and their buffers stacked."""
    models = []
    for seed in range(TRIALS):
        torch.manual_seed(seed)
        models.append(make().double())
    params, buffers = torch.func.stack_module_state(models)
    params = {name: p.detach().requires_grad_() for name, p in params.items()}
    return models, params, {name: b.clone() for name, b in buffers.items()}


def mapped(model, params, buffers, x, dim):
    def outputs(params, buffers, x):
        with Batched():
            return flat(torch.func.functional_call(model, (params, buffers), (x,)))

    return torch.vmap(outputs, in_dims=(0, 0, dim))(params, buffers, x)


def assert_same_gradients(y, expected, ours, theirs, *, twice=False):
    """Of a sum of squares, and of the squares of its gradients."""
    slopes = torch.autograd.grad(y.square().sum(), ours, create_graph=twice)
    wanted = [
        torch.autograd.grad(e.square().sum(), own, create_graph=twice) for e, own in zip(expected, theirs, strict=True)
    ]
    assert any(s.abs().max() > 1e-3 for s in slopes), "the problem is degenerate"
    for position, slope in enumerate(slopes):
        torch.testing.assert_close(slope, torch.stack([each[position] for each in wanted]), **EXACT)
    if twice:
        curved = [[g.square().sum() for g in each if g.requires_grad] for each in wanted]
        second = torch.autograd.grad(sum(s.square().sum() for s in slopes if s.requires_grad), ours)
        for position, slope in enumerate(second):
            others = [
                torch.autograd.grad(sum(c), own, retain_graph=True)[position]
                for c, own in zip(curved, theirs, strict=True)
            ]
            torch.testing.assert_close(slope, torch.stack(others), **EXACT)


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("shared", [True, False], ids=["one batch", "own batches"])
@pytest.mark.parametrize("name", MODELS)
def test_a_population_computes_what_each_model_does(name, shared):
    make, x = MODELS[name]
    models, params, buffers = population(make)
    xs = x if shared else torch.stack([x, x.flip(0), x.roll(1, 0)])
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="There is a performance drop")
        torch._C._debug_only_display_vmap_fallback_warnings(True)
        try:
            y = mapped(models[0], params, buffers, xs, None if shared else 0)
        finally:
            torch._C._debug_only_display_vmap_fallback_warnings(False)
    # torch's fused attention cannot be differentiated twice.
    with sdpa_kernel(SDPBackend.MATH):
        expected = [flat(model(x if shared else xs[i])) for i, model in enumerate(models)]
    torch.testing.assert_close(y, torch.stack(expected), **EXACT)
    theirs = [list(model.parameters()) for model in models]
    assert_same_gradients(y, expected, list(params.values()), theirs, twice=name in SMOOTH)
    for trial, model in enumerate(models):
        for buffer, value in model.named_buffers():
            torch.testing.assert_close(buffers[buffer][trial], value, **EXACT)
            assert buffer != "function.running_var" or (value - 1).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["transformer", "heads", "batch norm", "batch norm 2d", "lstm"])
def test_evaluation_is_mapped_too(name):
    make, x = MODELS[name]
    models, params, buffers = population(make)
    for model in models:
        model.eval()
    with torch.no_grad():
        y = mapped(models[0], params, buffers, x, None)
        torch.testing.assert_close(y, torch.stack([flat(model(x)) for model in models]), **EXACT)


def test_rrelu_has_one_slope_in_evaluation_and_none_in_training():
    layer = nn.RReLU().eval()
    x = normal(5, 4)

    def outputs(x):
        with Batched():
            return layer(x)

    torch.testing.assert_close(torch.vmap(outputs)(x), layer(x), **EXACT)
    with pytest.raises(Unsupported, match="take leaky_relu"), Batched():
        layer.train()(x)


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_convolutions_of_any_geometry(data):
    places = data.draw(st.integers(1, 2))

    def each(low, high):
        return data.draw(st.lists(st.integers(low, high), min_size=places, max_size=places))

    groups = data.draw(st.sampled_from([1, 2]))
    arguments = {"stride": each(1, 3), "padding": each(0, 2), "dilation": each(1, 2), "groups": groups}
    x = normal(2, 4, *each(7, 9))
    weight = normal(data.draw(st.sampled_from([1, TRIALS])), 2 * groups, 4 // groups, *each(1, 3)).requires_grad_()
    ours = torch.vmap(lambda w: convolve(x, w, **arguments))(weight)
    function = functional.conv1d if places == 1 else functional.conv2d
    expected = torch.stack([function(x, w, **arguments) for w in weight])
    torch.testing.assert_close(ours, expected, **EXACT)
    slopes = [torch.autograd.grad(y.square().sum(), weight)[0] for y in (ours, expected)]
    torch.testing.assert_close(*slopes, **EXACT)


@pytest.mark.parametrize("mapped_input", [True, False])
def test_gradients_of_convolutions_inside_and_through_vmap(mapped_input):
    x, weight, bias = normal(*[TRIALS] * mapped_input, 2, 4, 6), normal(TRIALS, 3, 4, 2), normal(TRIALS, 3)
    dims = (0 if mapped_input else None, 0, 0)

    def slopes(function):
        return torch.vmap(torch.func.grad(lambda *t: function(*t).square().sum(), argnums=(0, 1, 2)), in_dims=dims)

    for ours, expected in zip(
        slopes(convolve)(x, weight, bias), slopes(functional.conv1d)(x, weight, bias), strict=True
    ):
        torch.testing.assert_close(ours, expected, **EXACT)
    leaf = x.requires_grad_()
    for function in (convolve, functional.conv1d):
        y = torch.vmap(function, in_dims=dims)(leaf, weight, bias)
        slope = torch.autograd.grad(y.square().sum(), leaf)[0]
        expected = slope if function is convolve else expected
    torch.testing.assert_close(slope, expected, **EXACT)


def test_the_gradients_of_a_convolution_are_its_derivatives():
    x, weight, bias = normal(2, 2, 3, 5), normal(2, 4, 3, 2), normal(2, 4)
    inputs = [t.requires_grad_() for t in (x, weight, bias)]

    def function(x, weight, bias):
        return Convolution.apply(x, weight, bias, [2], [1], [1], False, [0], 1)

    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)
    shared = [t[:1].detach().requires_grad_() for t in inputs]
    assert torch.autograd.gradgradcheck(function, shared), "a population of one"
    for position in range(3):
        assert torch.autograd.gradcheck(function, [*inputs[:position], shared[position], *inputs[position + 1 :]])


@pytest.mark.parametrize("trials", [(3, 3), (1, 3), (3, 1)], ids=str)
@pytest.mark.parametrize("places", [(7,), (5, 6), (3, 4, 5)], ids=str)
@pytest.mark.parametrize("channels", [1, 4])
def test_tracing_is_told_the_layout_that_comes(trials, places, channels):
    x, weight = normal(trials[0], 2, channels, *places), normal(trials[1], 6, channels, *[3] * len(places))
    rest = [1] * len(places), [1] * len(places), [1] * len(places), False, [0] * len(places), 1
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(convolution, (x, weight, None, *rest), test_utils=checks)
    y = convolution(x, weight, None, *rest)
    assert (y.stride(2) == 1) == (len(places) > 1), "images lie with their channels last"
    for wanted in ([True, True, True], [False, True, True], [True, False, False]):
        torch.library.opcheck(convolution_backward, (y, x, weight, wanted, *rest), test_utils=checks)


def test_a_function_in_parts_keeps_its_defaults():
    loss = functional.triplet_margin_with_distance_loss
    points = normal(5, 3), normal(5, 3) + 1, normal(5, 3) - 1
    assert torch.equal(in_parts(loss)(*points), loss(*points))


def test_a_cpu_convolves_trial_by_trial():
    _, program, _ = traced_step("conv2d")
    targets = {str(node.target) for node in program.graph.nodes}
    assert {"fallline.convolution.default", "fallline.convolution_backward.default"} <= targets
    assert not any(target.startswith("aten.convolution") for target in targets)


@pytest.mark.parametrize(
    ("make", "x", "who"),
    [
        (lambda: nn.Embedding(7, 3, max_norm=1.0), TOKENS, "max_norm"),
        (lambda: nn.EmbeddingBag(7, 3, padding_idx=1), TOKENS, "embedding_bag"),
        (
            lambda: nn.LSTM(8, 3).double(),
            nn.utils.rnn.pack_sequence([normal(4, 8), normal(2, 8)]),
            "packed sequences",
        ),
    ],
)
def test_what_has_no_batched_form_is_refused_by_name(make, x, who):
    with pytest.raises(Unsupported, match=who), Batched():
        make()(x)


def traced_step(name):
    make, x = MODELS[name]
    models, params, buffers = population(make)

    def step(params, buffers, x):
        with torch.enable_grad():
            leaves = {n: p.detach().requires_grad_() for n, p in params.items()}
            y = mapped(models[0], leaves, buffers, x, None)
            return y.detach(), torch.autograd.grad(y.square().sum(), list(leaves.values()))

    arguments = params, buffers, x
    return step, make_fx(step, tracing_mode="fake", _allow_non_fake_inputs=True)(*arguments), arguments


def assert_same_step(program, step, arguments):
    (y, slopes), (expected, wanted) = program(*arguments), step(*arguments)
    torch.testing.assert_close(y, expected, **EXACT)
    for ours, theirs in zip(slopes, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, **EXACT)


@pytest.mark.parametrize(
    "name", ["conv1d", "transposed 2d", "deep lstm", "gru cell", "causal", "heads", "bag of means"]
)
def test_a_traced_step_computes_the_same(name):
    step, program, arguments = traced_step(name)
    assert_same_step(program, step, arguments)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", ["conv2d same", "batch norm 2d", "gru", "boolean mask"])
def test_a_compiled_step_computes_the_same(name):
    step, program, arguments = traced_step(name)
    assert_same_step(torch.compile(program), step, arguments)
