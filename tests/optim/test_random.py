"""Random numbers without a generator: what they are, that they are random, and that they are the same everywhere."""

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.utils import murmurhash3_32
from torch.func import vmap
from torch.fx.experimental.proxy_tensor import make_fx

import fallline as fl
from every_engine import assert_all_equal, in_every_engine
from fallline.optim import random
from fallline.optim.random import GRADIENT_NOISE, normal, rademacher, word

F64 = torch.float64
WORD = (1 << 32) - 1
MANY = 100_000


def seed_of(value: int) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.int64)


def step_of(value: float) -> torch.Tensor:
    return torch.tensor(float(value), dtype=F64)


def draw(function=normal, seed=1, step=1, stream=9, like=None):
    like = torch.empty(MANY, dtype=F64) if like is None else like
    return function(like, seed_of(seed), step_of(step), stream)


def published_hash(seed: int, step: int, stream: int, number: int, element: int) -> int:
    """Of six 32-bit words in little-endian order, by scikit-learn's MurmurHash3."""
    words = [seed & WORD, (seed >> 32) & WORD, stream, step, number, element]
    return int(murmurhash3_32(b"".join(w.to_bytes(4, "little") for w in words), seed=0, positive=True))


@pytest.mark.parametrize("seed", [0, 7, -5, 2**62 + 12345, -(2**63)])
@pytest.mark.parametrize("step", [0, 1, 12, 2**31 + 5])
def test_bits_are_the_published_hash(seed, step):
    like = torch.empty(2, 3, dtype=F64)
    hashes = [[published_hash(seed, step, 3, number, i) for i in range(6)] for number in (0, 1)]
    for number in (0, 1):
        assert word(like, seed_of(seed), step_of(step), 3, number).flatten().tolist() == hashes[number]
    radius = np.sqrt(-2 * np.log((np.array(hashes[0]) + 0.5) / 2**32))
    found = normal(like, seed_of(seed), step_of(step), 3)
    np.testing.assert_allclose(found.flatten(), radius * np.cos(2 * np.pi * np.array(hashes[1]) / 2**32), rtol=1e-11)
    signs = rademacher(like, seed_of(seed), step_of(step), 3)
    assert signs.flatten().tolist() == [-1.0 if each >= 2**31 else 1.0 for each in hashes[0]]


def test_no_product_overflows():
    """Compilers take it that none does: a loop over the elements of a hash that wraps around never ended."""
    largest = max(abs(f) for f in (*random.BLOCK_FACTORS, *random.FINAL_FACTORS, 5))
    assert largest * random.WORD + 0xE6546B64 < 2**63
    assert random.WORD << 15 < 2**63


@pytest.mark.parametrize("seed", [0, 1, -3, 2**40])
@pytest.mark.parametrize("step", [1, 1000])
def test_normal_numbers_are_normal(seed, step):
    x = draw(seed=seed, step=step).numpy()
    assert stats.kstest(x, "norm").pvalue > 1e-3
    moments = [np.mean(x**k) for k in range(1, 7)]
    # E x^k is 0, 1, 0, 3, 0, 15; the deviation of a mean of x^k is √((2k − 1)!!/n).
    allowed = [4 * np.sqrt(odd / MANY) for odd in (1, 3, 15, 105, 945, 10395)]
    assert all(abs(m - e) < a for m, e, a in zip(moments, (0, 1, 0, 3, 0, 15), allowed, strict=True))
    assert 3.8 < np.abs(x).max() < 6.8


def test_every_bit_is_a_fair_coin_and_no_two_agree():
    words = [word(torch.empty(MANY), seed_of(3), step_of(1), 9, number).numpy() for number in (0, 1)]
    coins = np.concatenate([(w[:, None] >> np.arange(32)) & 1 for w in words], axis=1)
    assert np.abs(coins.mean(0) - 0.5).max() < 4.5 * 0.5 / np.sqrt(MANY)
    agreement = np.corrcoef(coins.T.astype(float)) - np.eye(64)
    assert np.abs(agreement).max() < 5.5 / np.sqrt(MANY)


def test_signs_are_fair():
    signs = draw(rademacher)
    assert set(signs.tolist()) == {-1.0, 1.0}
    assert abs(signs.mean()) < 4 / np.sqrt(MANY)


@pytest.mark.parametrize("function", [normal, rademacher])
def test_numbers_of_other_steps_seeds_streams_and_places_have_nothing_to_do_with_each_other(function):
    base = draw(function)
    others = {
        "next step": draw(function, step=2),
        "far step": draw(function, step=100_001),
        "next seed": draw(function, seed=2),
        "seed for step": draw(function, seed=2, step=0),
        "the seed of the run next to it": draw(function, seed=1 + 1_000_003),
        "a seed that differs far up": draw(function, seed=1 + 2**40),
        "another stream": draw(function, stream=10),
        **{f"the element {lag} further on": base.roll(lag) for lag in (1, 2, 3, 64, 1024)},
    }
    for name, other in others.items():
        assert not torch.equal(base, other), name
        for a, b in ((base, other), (base.square(), other.square()), (base.square(), other)):
            if a.std() > 0 and b.std() > 0:
                correlation = float(torch.corrcoef(torch.stack([a, b]))[0, 1])
                assert abs(correlation) < 4.5 / np.sqrt(MANY), f"{name}: {correlation}"
    # Of one element along the steps, and of one element and step along the seeds.
    like = torch.empty((), dtype=F64)
    along_steps = vmap(lambda step: function(like, seed_of(5), step, 9))(torch.arange(1.0, MANY + 1, dtype=F64))
    along_seeds = vmap(lambda seed: function(like, seed, step_of(5), 9))(torch.arange(MANY))
    for sequence in (along_steps, along_seeds):
        if function is normal:
            assert stats.kstest(sequence.numpy(), "norm").pvalue > 1e-3
        for lag in (1, 2, 10):
            correlation = float(torch.corrcoef(torch.stack([sequence, sequence.roll(lag)]))[0, 1])
            assert abs(correlation) < 4.5 / np.sqrt(MANY)


def test_the_seed_and_the_step_do_not_stand_for_each_other():
    assert not torch.equal(draw(seed=2, step=3), draw(seed=3, step=2))
    assert torch.equal(draw(seed=2, step=3), draw(seed=2, step=3))


@pytest.mark.parametrize("function", [normal, rademacher])
@pytest.mark.parametrize("shape", [(), (0,), (0, 3), (7,), (2, 3, 2)], ids=str)
def test_shape_and_dtype_are_those_of_the_tensor(function, shape):
    exact = function(torch.empty(shape, dtype=F64), seed_of(1), step_of(1), 9)
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        found = function(torch.empty(shape, dtype=dtype), seed_of(1), step_of(1), 9)
        assert found.shape == shape
        assert found.dtype == dtype
        assert torch.equal(found, exact.to(dtype))


@pytest.mark.parametrize("function", [normal, rademacher])
def test_mapped_traced_and_compiled_they_are_the_same_numbers(function):
    like, seeds, step = torch.empty(3, 5, dtype=F64), torch.tensor([4, -9, 2**50]), step_of(77)
    alone = torch.stack([function(like, seed, step, 9) for seed in seeds])

    def mapped(seeds, step):
        return vmap(lambda seed: function(like, seed, step, 9))(seeds)

    traced = make_fx(mapped, tracing_mode="fake", _allow_non_fake_inputs=True)(seeds, step)
    compiled = torch.compile(mapped, fullgraph=True, backend="aot_eager")
    for found in (mapped(seeds, step), traced(seeds, step), compiled(seeds, step)):
        assert torch.equal(found, alone)
    assert torch.equal(traced(seeds, step_of(78)), torch.stack([function(like, s, step_of(78), 9) for s in seeds]))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_compilers_own_code_gives_the_same_bits():
    like, step = torch.empty(1003, dtype=F64), step_of(77)
    compiled = torch.compile(lambda seed: word(like, seed, step, 9, 0), fullgraph=True)
    for seed in (4, -9, 2**50):
        assert torch.equal(compiled(seed_of(seed)), word(like, seed_of(seed), step, 9, 0))


def noise_of(optimizer, params, seed=0, steps=1):
    """What the optimizer adds to gradients of zero."""
    state = optimizer.init(params, seed=seed)
    for _ in range(steps):
        found, state = optimizer.update({n: torch.zeros_like(p) for n, p in params.items()}, state, params)
    return found


def test_gradient_noise_fades_as_the_paper_says():
    params = {"w": torch.zeros(MANY, dtype=F64)}
    noisy = fl.optim.chain(fl.optim.add_noise(eta=0.3, gamma=0.55))
    for steps in (1, 2, 10):
        found = noise_of(noisy, params, steps=steps)["w"].numpy()
        t = steps - 1  # the paper's
        deviation = np.sqrt(0.3 / (1 + t) ** 0.55)
        assert stats.kstest(found / deviation, "norm").pvalue > 1e-3
        np.testing.assert_allclose(
            found, deviation * draw(seed=seed_slot("w"), step=steps, stream=GRADIENT_NOISE).numpy(), rtol=1e-12
        )


def seed_slot(name, seed=0):
    return int(fl.optim.chain(fl.optim.add_noise(1.0)).init({name: torch.zeros(1)}, seed=seed)["slots"][name]["seed"])


def test_gradient_noise_differs_between_parameters_seeds_and_steps_and_is_added():
    noisy = fl.optim.chain(fl.optim.add_noise(eta=1.0))
    params = {"a": torch.zeros(4), "b": torch.zeros(4)}
    first = noise_of(noisy, params)
    assert not torch.equal(first["a"], first["b"])
    assert not torch.equal(first["a"], noise_of(noisy, params, seed=1)["a"])
    assert torch.equal(first["a"], noise_of(noisy, {"a": params["a"]})["a"]), "beside others it is the same"
    second = noise_of(noisy, params, steps=2)["a"] * 2 ** (0.55 / 2)
    assert (first["a"] - second).abs().min() > 1e-3
    g = {"a": torch.tensor([1.0, 2.0, 3.0, 4.0])}
    added, _ = noisy.update(g, noisy.init({"a": params["a"]}), {"a": params["a"]})
    assert torch.equal(added["a"], g["a"] + first["a"])
    silent = fl.optim.chain(fl.optim.add_noise(eta=0.0))
    assert torch.equal(silent.update(g, silent.init(params), params)[0]["a"], g["a"])


@pytest.mark.parametrize(("arguments", "message"), [({"eta": -1.0}, "eta"), ({"eta": 1.0, "gamma": -0.1}, "gamma")])
def test_numbers_outside_their_domain_are_refused(arguments, message):
    with pytest.raises(ValueError, match=f"{message} = .* is negative"):
        fl.optim.add_noise(**arguments)


def test_noisy_trials_equal_a_plain_loop_in_every_engine():
    task, steps, seed = fl.tasks.digits(dtype=F64), 12, 1
    noisy = fl.optim.chain(fl.optim.add_noise(eta=0.01), fl.optim.sgd(lr=0.1))
    torch.manual_seed(seed)
    model = task.model()
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    order = torch.Generator().manual_seed(seed)
    losses = []
    for t, index in enumerate(torch.randperm(len(task.train.x), generator=order).split(64)[:steps], start=1):
        loss = torch.nn.functional.cross_entropy(model(task.train.x[index]), task.train.y[index])
        losses.append(loss.item())
        named = dict(model.named_parameters())
        with torch.no_grad():
            for (name, p), g in zip(named.items(), torch.autograd.grad(loss, list(named.values())), strict=True):
                noise = draw(seed=seed_slot(name, seed), step=t, stream=GRADIENT_NOISE, like=p)
                p -= 0.1 * (g + (0.01 / t**0.55) ** 0.5 * noise)
    end = {name: p.detach() for name, p in model.named_parameters()}
    assert all((end[name] != start[name]).all() for name in end), "a weight of an unused pixel moves by noise alone"
    assert_all_equal(in_every_engine(task, noisy, steps=steps, seed=seed), (np.array(losses), end), rtol=1e-11)
