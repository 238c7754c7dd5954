"""Draws handed to a mapped model are those that the plain module makes, bit for bit."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from fallline.errors import Unsupported
from fallline.sweeps.batched import Batched
from fallline.sweeps.draws import Draw, Replaying, Streams, record

CPU = torch.device("cpu")
SEEDS = (5, 6)
STEPS = 3


def first(outputs):
    return outputs[0] if isinstance(outputs, tuple) else outputs


class Applied(nn.Module):
    """A linear layer and a function of its output."""

    def __init__(self, function):
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.function = function

    def forward(self, x):
        return self.function(self.linear(x))


class Attention(nn.Module):
    def __init__(self, **call):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, dropout=0.3, batch_first=True)
        self.call = call

    def forward(self, x):
        return self.attention(x, x, x, **self.call)[0]


class Autoencoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = nn.Linear(8, 4), nn.Linear(2, 8)

    def forward(self, x):
        mean, log_scale = self.encoder(x).chunk(2, dim=-1)
        return self.decoder(mean + torch.randn_like(mean) * log_scale.exp())


class Turned(nn.Module):
    """Dropout on tensors whose order in memory is not that of their dimensions."""

    def __init__(self):
        super().__init__()
        self.convolution, self.linear, self.dropout = nn.Conv2d(4, 5, 3), nn.Linear(5, 5), nn.Dropout(0.4)

    def forward(self, x):
        y = self.dropout(self.dropout(self.convolution(x)).transpose(1, 3))
        return self.dropout(self.dropout(self.linear(y)).permute(2, 3, 0, 1))


SAMPLES, SEQUENCES, IMAGES = torch.randn(6, 8), torch.randn(5, 3, 8), torch.randn(2, 4, 8, 8)


def with_linear(layer):
    return lambda: nn.Sequential(nn.Linear(8, 8), layer())


# name: (model, input, how many draws a step makes)
MODELS = {
    "dropout": (with_linear(lambda: nn.Dropout(0.3)), SAMPLES, 1),
    "dropout in place": (with_linear(lambda: nn.Dropout(0.3, inplace=True)), SAMPLES, 1),
    "dropout of nothing": (with_linear(lambda: nn.Dropout(0.0)), SAMPLES, 0),
    "dropout of all": (with_linear(lambda: nn.Dropout(1.0)), SAMPLES, 0),
    "dropout1d": (with_linear(lambda: nn.Dropout1d(0.3)), SEQUENCES, 1),
    "dropout2d": (with_linear(lambda: nn.Dropout2d(0.3)), IMAGES, 1),
    "dropout2d in place": (with_linear(lambda: nn.Dropout2d(0.3, inplace=True)), IMAGES, 1),
    "dropout3d": (with_linear(lambda: nn.Dropout3d(0.3)), torch.randn(2, 3, 4, 5, 8), 1),
    "alpha dropout": (with_linear(lambda: nn.AlphaDropout(0.3)), SAMPLES, 1),
    "feature alpha dropout": (with_linear(lambda: nn.FeatureAlphaDropout(0.3)), IMAGES, 1),
    "turned": (Turned, IMAGES, 4),
    "attention with weights": (Attention, SEQUENCES, 1),
    "attention": (lambda: Attention(need_weights=False), SEQUENCES, 1),
    "transformer": (lambda: nn.TransformerEncoderLayer(8, 2, 16, dropout=0.2, batch_first=True), SEQUENCES, 4),
    "grouped heads": (
        lambda: Applied(
            lambda y: functional.scaled_dot_product_attention(
                y.expand(4, 6, 6, 8), y.expand(4, 2, 6, 8), y.expand(4, 2, 6, 8), dropout_p=0.5, enable_gqa=True
            )
        ),
        SAMPLES,
        1,
    ),
    "lstm": (lambda: nn.LSTM(8, 5, num_layers=3, dropout=0.3), SEQUENCES, 2),
    "gru": (lambda: nn.GRU(8, 5, num_layers=2, dropout=0.3, bidirectional=True, batch_first=True), SEQUENCES, 1),
    "rnn": (lambda: nn.RNN(8, 5, num_layers=2, dropout=0.3, bias=False), SEQUENCES, 1),
    "projected lstm": (
        lambda: nn.LSTM(8, 5, num_layers=2, dropout=0.3, proj_size=2, bidirectional=True),
        SEQUENCES,
        1,
    ),
    "autoencoder": (Autoencoder, SAMPLES, 1),
    "gumbel": (lambda: Applied(lambda y: functional.gumbel_softmax(y, 0.7)), SAMPLES, 1),
    "normal": (lambda: Applied(lambda y: y + torch.normal(y, y.abs()) + torch.normal(y, 0.3)), SAMPLES, 2),
    "normal of scales": (
        lambda: Applied(lambda y: y + torch.normal(1.0, y.exp()) + torch.normal(1, 2, (8,))),
        SAMPLES,
        2,
    ),
    "uniform": (lambda: Applied(lambda y: y * torch.rand(6, 8) + torch.rand_like(y) + torch.randn((6, 1))), SAMPLES, 3),
    "coins": (lambda: Applied(lambda y: y * torch.bernoulli(y.sigmoid()) + y.detach().bernoulli(0.3)), SAMPLES, 2),
    "integers": (
        lambda: Applied(
            lambda y: (
                y * torch.randint(3, (8,))
                + torch.randint(1, 50, size=(6, 1))
                + torch.randint(low=2, high=50, size=(8,))
                + torch.randint_like(y, 4)
                + torch.randint_like(y, 2, 7)
                + torch.randint_like(y, low=2, high=7)
            )
        ),
        SAMPLES,
        6,
    ),
    "permutation": (lambda: Applied(lambda y: y[torch.randperm(6)] * y), SAMPLES, 1),
    "filled": (
        lambda: Applied(
            lambda y: (
                y
                + torch.empty_like(y).normal_(1, std=2)
                + torch.zeros_like(y).uniform_(-1, 1)
                + torch.empty(8, dtype=y.dtype).normal_()
                + torch.zeros_like(y).bernoulli_(p=0.2)
                + torch.zeros_like(y).exponential_(3.0)
            )
        ),
        SAMPLES,
        5,
    ),
    "distribution": (
        lambda: Applied(lambda y: torch.distributions.Normal(y, 1.0, validate_args=False).rsample()),
        SAMPLES,
        1,
    ),
}


@pytest.mark.filterwarnings("ignore:LSTM with projections")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_a_mapped_step_repeats_what_the_plain_loop_draws(name, dtype):
    make, x, count = MODELS[name]
    x = x.to(dtype)
    modules, states = {}, {}
    for seed in SEEDS:
        torch.manual_seed(seed)
        modules[seed] = make().to(dtype)
        states[seed] = torch.get_rng_state()
    base = modules[SEEDS[0]]
    draws = record(lambda: base(x), CPU)
    assert len(draws) == count
    streams = Streams(states, CPU)
    params = {
        n: torch.stack([modules[seed].get_parameter(n).detach() for seed in SEEDS]).requires_grad_()
        for n, _ in base.named_parameters()
    }

    def outputs(params, values):
        with Replaying(draws, values) as replaying, Batched():
            y = first(torch.func.functional_call(base, params, (x,)))
        replaying.finish()
        return y

    tolerance = {"rtol": 1e-10, "atol": 1e-10} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-4}
    steps = []
    for _ in range(STEPS):
        y = torch.vmap(outputs)(params, streams.next(draws))
        steps.append((y, torch.autograd.grad(y.square().sum(), list(params.values()))))
    for row, seed in enumerate(SEEDS):
        torch.set_rng_state(states[seed])
        before = None
        for y, slopes in steps:
            expected = first(modules[seed](x))
            torch.testing.assert_close(y[row], expected.detach(), **tolerance)
            for ours, theirs in zip(
                slopes, torch.autograd.grad(expected.square().sum(), list(modules[seed].parameters())), strict=True
            ):
                torch.testing.assert_close(ours[row], theirs, **tolerance)
            assert not count or before is None or not torch.equal(before, expected), "every step draws anew"
            before = expected
        assert torch.equal(streams.tensors()[str(seed)], torch.get_rng_state())


@pytest.mark.parametrize("shape", [(3,), (16,), (4, 5), (0, 3)])
@pytest.mark.parametrize("order", ["contiguous", "transposed"])
def test_a_mask_has_the_bits_of_torch(shape, order):
    x = torch.ones(shape) if order == "contiguous" else torch.ones(shape[::-1]).permute(*range(len(shape))[::-1])
    torch.manual_seed(7)
    (draw, *_) = record(lambda: functional.dropout(x, 0.3), CPU) or [None]
    assert (draw is None) == (x.numel() == 0)
    if draw:
        generator = torch.Generator().manual_seed(7)
        assert torch.equal(draw.sample(generator), functional.dropout(x, 0.3))


def test_recording_leaves_the_generator_and_evaluation_draws_nothing():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    assert len(record(lambda: nn.Dropout()(torch.ones(3)), CPU)) == 1
    assert torch.equal(torch.get_rng_state(), before)
    assert record(lambda: nn.Dropout().eval()(torch.ones(3)), CPU) == ()


def test_seeds_that_stay_go_on_and_states_come_back():
    states = {seed: torch.Generator().manual_seed(seed).get_state() for seed in (1, 2, 3)}
    draws = [Draw.like(torch.empty(2, 4), "normal_", 0, 1)]
    streams, fewer = Streams(states, CPU), Streams(states, CPU)
    fewer.keep([3, 1])
    (all_of_them,), (some,) = streams.next(draws), fewer.next(draws)
    assert torch.equal(some, all_of_them[[2, 0]])
    kept = streams.tensors()
    (after,) = streams.next(draws)
    assert not torch.equal(after, all_of_them)
    streams.restore(kept)
    assert torch.equal(streams.next(draws)[0], after)
    fresh = Streams({}, CPU)
    fresh.restore(kept)
    assert torch.equal(fresh.next(draws)[0], after)


@pytest.mark.parametrize(
    ("function", "who"),
    [
        (lambda x: functional.rrelu(x, training=True), r"rrelu\(\)"),
        (lambda x: torch.multinomial(x.softmax(-1), 2), r"multinomial\(\)"),
        (lambda x: torch.poisson(x.exp()), r"poisson\(\)"),
        (lambda x: torch.randn(3, generator=torch.Generator()), "leave out generator="),
        (lambda x: x.clone().bernoulli_(x.sigmoid()), r"bernoulli_\(\)"),
    ],
)
def test_what_is_random_and_no_draw_is_refused_by_name(function, who):
    with pytest.raises(Unsupported, match=who):
        record(lambda: function(torch.randn(4, 5)), CPU)


def test_random_numbers_that_no_mode_sees_are_refused():
    def hidden():
        with torch._C.DisableTorchFunction():
            torch.rand(3)

    for run in (hidden, lambda: (hidden(), torch.ones(3))):
        with pytest.raises(Unsupported, match="the model draws"):
            record(run, CPU)


def test_dropout_in_a_packed_lstm_is_refused():
    packed = nn.utils.rnn.pack_sequence([torch.randn(4, 8), torch.randn(2, 8)])
    layer = nn.LSTM(8, 5, num_layers=2, dropout=0.5)
    with pytest.raises(Unsupported, match=r"lstm\(\)"):
        record(lambda: layer(packed), CPU)


def test_replaying_refuses_another_course():
    x = torch.ones(3, 4)
    draws = record(lambda: functional.dropout(x, 0.5), CPU)
    values = [torch.ones(3, 4)]

    def replayed(function):
        with Replaying(draws, values) as replaying:
            function()
        replaying.finish()

    replayed(lambda: functional.dropout(x, 0.5))
    with pytest.raises(Unsupported, match=r"does not draw dropout\(0.5\) of shape \[3, 4\]"):
        replayed(lambda: None)
    with pytest.raises(Unsupported, match="which the plain call did not"):
        replayed(lambda: functional.dropout(functional.dropout(x, 0.5)))
    for other in (lambda: functional.dropout(x, 0.4), lambda: functional.dropout(x.T, 0.5), lambda: torch.rand(3, 4)):
        with pytest.raises(Unsupported, match=r"where the plain call drew dropout\(0.5\)"):
            replayed(other)


def test_a_tensor_that_all_trials_share_tells_who_reads_it():
    def reads_the_tensor(values):
        with Replaying(draws, [values]):
            noise = torch.empty(3)
            noise.normal_()
            return noise + 0 * values

    draws = record(lambda: torch.empty(3).normal_(), CPU)
    assert torch.vmap(reads_the_tensor)(torch.ones(2, 3)).isnan().all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: fused dropout draws in its own order there")
def test_dropout_on_a_gpu_repeats_the_fused_kernel():
    device = torch.device("cuda")
    x = torch.randn(64, 33, device=device)
    draws = record(lambda: functional.dropout(x, 0.3), device)
    torch.cuda.manual_seed(4)
    streams = Streams({4: torch.cuda.get_rng_state(device)}, device)
    for _ in range(STEPS):
        (noise,) = streams.next(draws)
        assert torch.equal(x * noise[0], functional.dropout(x, 0.3))
