import importlib.util
import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.func import grad, vmap
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from fallline.errors import LossMismatch
from fallline.losses import vocabulary_tiles as tiles
from fallline.losses.vocabulary import linear_cross_entropy
from fallline.sweeps.traced import trace

EXACT = {"rtol": 1e-11, "atol": 1e-13}
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton") is not None
torch_has_it = pytest.mark.skipif(not hasattr(nn, "LinearCrossEntropyLoss"), reason="an older torch has none")
on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
with_kernel = pytest.mark.skipif(
    not (torch.cuda.is_available() or INTERPRETED), reason="needs a CUDA device, or Triton's interpreter"
)


def problem(tokens=19, depth=6, classes=23, seed=0, scale=1.0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    hidden = (torch.randn(tokens, depth, generator=g, dtype=torch.float64) * scale).to(dtype)
    weight = (torch.randn(classes, depth, generator=g, dtype=torch.float64) / depth**0.5).to(dtype)
    bias = torch.randn(classes, generator=g, dtype=torch.float64).to(dtype)
    noise = 2 * scale * torch.randn(tokens, classes, generator=g, dtype=torch.float64)
    target = (hidden.double() @ weight.double().T + noise).argmax(1)
    return (hidden, weight, bias), target


def value_and_gradients(loss, prediction, target):
    leaves = [part.detach().clone().requires_grad_() for part in prediction]
    value = loss(tuple(leaves), target)
    slope = torch.linspace(0.5, 1.5, value.numel(), dtype=value.dtype, device=value.device).view_as(value)
    return value.detach(), *torch.autograd.grad(value, leaves, slope if value.ndim else None)


def naive(*, softcap=None, z_loss=0.0, **arguments):
    """All logits at once, by torch; the soft cap and the z-loss as their papers write them."""

    def loss(prediction, target):
        logits = functional.linear(*prediction)
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        value = functional.cross_entropy(logits, target, **arguments)
        kept = target != arguments.get("ignore_index", -100)
        weights = arguments.get("weight", torch.ones(logits.shape[1], dtype=logits.dtype))
        counted = torch.where(kept, weights[target.where(kept, 0)], 0)
        return value + z_loss * (counted * torch.logsumexp(logits, 1) ** 2).sum() / counted.sum()

    return loss


def same(found, expected, **tolerance):
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, **(tolerance or EXACT))


@pytest.mark.parametrize("chunk", ["auto", 1, 4, 1000])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("z_loss", [0.0, 0.05])
def test_equals_torch_on_all_logits(chunk, smoothing, weighted, softcap, z_loss):
    prediction, target = problem()
    target[3:6] = 7
    weight = torch.linspace(0.2, 3, 23, dtype=torch.float64) if weighted else None
    arguments = {"label_smoothing": smoothing, "ignore_index": 7} | ({} if weight is None else {"weight": weight})
    expected = value_and_gradients(naive(softcap=softcap, z_loss=z_loss, **arguments), prediction, target)
    assert all(part.abs().max() > 1e-3 for part in expected), "nothing would be proven without a gradient"
    ours = linear_cross_entropy(chunk=chunk, softcap=softcap, z_loss=z_loss, **arguments)
    same(value_and_gradients(ours, prediction, target), expected)


@given(
    st.integers(1, 40), st.integers(1, 9), st.integers(1, 40), st.integers(1, 50), st.floats(0, 1), st.integers(0, 99)
)
@settings(deadline=None, max_examples=40)
def test_equals_torch_for_any_shape_and_chunk(tokens, depth, classes, chunk, smoothing, seed):
    prediction, target = problem(tokens, depth, classes, seed)
    expected = value_and_gradients(naive(label_smoothing=smoothing), prediction, target)
    ours = linear_cross_entropy(label_smoothing=smoothing, chunk=chunk)
    same(value_and_gradients(ours, prediction, target), expected)


@torch_has_it
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_equals_torchs_own_linear_cross_entropy_in_its_order(reduction):
    (hidden, weight, bias), target = problem()
    theirs = functional.linear_cross_entropy(hidden, weight, target, linear_bias=bias, reduction=reduction)
    ours = linear_cross_entropy(chunk=3, reduction=reduction)
    same([ours(hidden, weight, target, bias)], [theirs])
    theirs = functional.linear_cross_entropy(hidden, weight, target, reduction=reduction)
    same([ours(hidden, weight, target), ours((hidden, weight), target)], [theirs, theirs])


@torch_has_it
def test_equals_torchs_own_module():
    (hidden, weight, _), target = problem()
    module = nn.LinearCrossEntropyLoss(6, 23, dtype=torch.float64, options=nn.LinearCrossEntropyOptions())
    module.linear.weight.data = weight
    same([linear_cross_entropy(chunk=2)(hidden, weight, target)], [module(hidden, target).detach()])


def test_hidden_states_may_have_more_dimensions():
    (hidden, weight, bias), target = problem(tokens=24)
    flat = linear_cross_entropy(chunk=3, reduction="none")((hidden, weight, bias), target)
    shaped = linear_cross_entropy(chunk=3, reduction="none")((hidden.view(4, 6, 6), weight, bias), target.view(4, 6))
    same([shaped], [flat.view(4, 6)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scale", [0.3, 3.0, 100.0])
@pytest.mark.parametrize("chunk", ["auto", 5, 40])
def test_the_error_is_no_greater_than_on_all_logits(dtype, scale, chunk):
    squares = torch.zeros(2, 4, dtype=torch.float64)
    for seed in range(8):
        for shape in ((64, 32, 500), (37, 128, 33)):
            prediction, target = problem(*shape, seed, scale, dtype)
            truth = value_and_gradients(naive(reduction="none"), [part.double() for part in prediction], target)
            assert all(part.norm() > 1e-2 for part in truth)
            theirs = value_and_gradients(naive(reduction="none"), prediction, target)
            ours = value_and_gradients(linear_cross_entropy(reduction="none", chunk=chunk), prediction, target)
            for i, (a, b, exact) in enumerate(zip(ours, theirs, truth, strict=True)):
                squares[0, i] += ((a.double() - exact).norm() / exact.norm()) ** 2
                squares[1, i] += ((b.double() - exact).norm() / exact.norm()) ** 2
    assert ((squares[0] / squares[1]).sqrt() <= 1.05).all(), (squares[0] / squares[1]).sqrt()


@pytest.mark.parametrize("offset", [1e4, -1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_huge_logits_that_are_all_alike_lose_no_digits(offset, dtype):
    """The normaliser is never rounded at the size of the logits."""
    (hidden, weight, bias), target = problem(dtype=dtype)
    hidden, weight = (hidden * 8).round(), (weight * 8).round() / 8  # sums of such products are exact
    shifted = torch.round(bias) + offset, torch.round(bias)
    for loss in (linear_cross_entropy(chunk=2), linear_cross_entropy()):
        far, near = (value_and_gradients(loss, (hidden, weight, b), target) for b in shifted)
        same(far, near, rtol=1e-6 if dtype == torch.float32 else 1e-12, atol=1e-7)


@pytest.mark.parametrize("chunk", ["auto", 2])
def test_logits_of_ten_thousand_and_classes_ruled_out_are_finite_and_right(chunk):
    prediction, target = problem(scale=1e4)
    expected = value_and_gradients(naive(), prediction, target)
    assert expected[0] > 1e2
    same(value_and_gradients(linear_cross_entropy(chunk=chunk), prediction, target), expected)
    hidden, weight, bias = (part.float() for part in problem()[0])
    bias[:9] = -torch.inf  # a whole block of classes at chunk = 2
    target = target.clamp(min=9)
    expected = value_and_gradients(naive(), (hidden, weight, bias), target)
    assert expected[1].isfinite().all()
    found = value_and_gradients(linear_cross_entropy(chunk=chunk), (hidden, weight, bias), target)
    same(found, expected, rtol=1e-5, atol=1e-6)


class Largest(TorchDispatchMode):
    """The largest number of elements that any operation or matrix product has made, and the names of all operations."""

    def __init__(self):
        super().__init__()
        self.elements, self.product, self.names = 0, 0, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        self.names.append(function.overloadpacket.__name__)
        if self.names[-1] in ("mm", "bmm"):
            self.product = max(self.product, made.numel())
        for each in made if isinstance(made, tuple | list) else [made]:
            if isinstance(each, torch.Tensor):
                self.elements = max(self.elements, each.untyped_storage().nbytes() // each.element_size())
        return made


@pytest.mark.parametrize("arguments", [{}, {"label_smoothing": 0.1, "z_loss": 0.1, "softcap": 3.0}])
@pytest.mark.parametrize("func", [False, True])
def test_no_tensor_as_large_as_all_logits_is_ever_made(arguments, func):
    tokens, depth, classes, chunk = 1500, 4, 2000, 8
    (hidden, weight, bias), target = problem(tokens, depth, classes, dtype=torch.float32)
    hidden, weight, bias = (part.requires_grad_(not func) for part in (hidden, weight, bias))
    loss = linear_cross_entropy(chunk=chunk, **arguments)
    with Largest() as seen:
        if func:
            grad(loss)((hidden, weight, bias), target)
        else:
            loss((hidden, weight, bias), target).backward()
    # A tile, or one number for each token and block of classes; a classifier has 8,000 numbers here.
    assert seen.elements <= max(chunk * classes, 4 * tokens * -(-classes // 126)), seen.elements
    assert seen.elements < tokens * classes / 20


def test_by_default_no_more_than_a_few_million_logits_exist():
    (hidden, weight, _), target = problem(3000, 2, 2000, dtype=torch.float32)
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    with Largest() as seen:
        linear_cross_entropy()(leaves, target).backward()
    assert 1e6 < seen.elements <= tiles.ON_A_CPU < 3000 * 2000


def test_all_trials_together_have_no_more_logits_than_one():
    several = [problem(200, 2, 300, seed) for seed in range(8)]
    hidden, weight = (torch.stack([p[i] for p, _ in several]) for i in range(2))
    loss = linear_cross_entropy(chunk=20)
    with Largest() as seen:
        vmap(grad(lambda h, w, t: loss((h, w), t), (0, 1)))(hidden, weight, torch.stack([t for _, t in several]))
    assert 20 * 300 / 2 < seen.product <= 20 * 300


def test_second_derivatives_need_no_more_memory():
    (hidden, weight, _), target = problem(1500, 2, 200)
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    with Largest() as seen:
        slopes = torch.autograd.grad(linear_cross_entropy(chunk=8)(leaves, target), leaves, create_graph=True)
        sum(slope.square().sum() for slope in slopes).backward()
    assert seen.elements < 1500 * 200 / 5
    assert hidden.grad.abs().max() > 1e-9


@pytest.mark.parametrize(("moving", "products"), [([0], 2), ([1], 2), ([2], 1), ([0, 1, 2], 3)])
def test_gradients_that_nobody_wants_are_not_computed(moving, products):
    prediction, target = problem()
    leaves = [part.requires_grad_(i in moving) for i, part in enumerate(prediction)]
    value = linear_cross_entropy(chunk=1000)(tuple(leaves), target)
    with Largest() as seen:
        value.backward()
    assert seen.names.count("mm") == products
    expected = value_and_gradients(naive(), prediction, target)[1:]
    for i, leaf in enumerate(leaves):
        assert (leaf.grad is not None) == (i in moving)
        if i in moving:
            same([leaf.grad], [expected[i]])


def test_a_graph_that_is_kept_can_be_gone_through_twice():
    (hidden, weight, bias), target = problem()
    value = linear_cross_entropy(chunk=3)((hidden.requires_grad_(), weight, bias), target)
    first = torch.autograd.grad(value, hidden, retain_graph=True)
    assert torch.equal(first[0], torch.autograd.grad(value, hidden)[0])


MANY = {"label_smoothing": 0.1, "z_loss": 0.05, "softcap": 2.0, "weight": torch.linspace(0.2, 3, 23).double()}


@pytest.mark.parametrize("arguments", [{}, MANY], ids=["plain", "everything"])
@pytest.mark.parametrize("shared", ["nothing", "target", "classifier", "hidden states"])
def test_trials_with_and_without_a_shared_part_are_each_their_own(arguments, shared):
    several = [problem(seed=seed) for seed in range(3)]
    stacked = [torch.stack([p[i] for p, _ in several]) for i in range(3)] + [torch.stack([t for _, t in several])]
    common = {"nothing": [], "target": [3], "classifier": [1, 2], "hidden states": [0]}[shared]
    given = [part[0] if i in common else part for i, part in enumerate(stacked)]
    dims = tuple(None if i in common else 0 for i in range(4))
    loss = linear_cross_entropy(chunk=3, **arguments)
    together = vmap(grad(lambda h, w, b, t: loss((h, w, b), t), (0, 1, 2)), dims)(*given)
    hidden_only = vmap(grad(lambda h, w, b, t: loss((h, w, b), t)), dims)(*given)
    leaves = [part.clone().requires_grad_() for part in given[:3]]
    values = vmap(lambda h, w, b, t: loss((h, w, b), t), dims)(*leaves, given[3])
    summed = torch.autograd.grad(values.sum(), leaves)
    rows = []
    for trial in range(3):
        mine = [part if i in common else part[trial] for i, part in enumerate(given)]
        value, *slopes = value_and_gradients(naive(**arguments), mine[:3], mine[3])
        rows.append(slopes)
        same([values[trial].detach(), hidden_only[trial]], [value, slopes[0]])
        same([part[trial] for part in together], slopes)
    for i, found in enumerate(summed):
        each = torch.stack([row[i] for row in rows])
        same([found], [each.sum(0) if i in common else each])


def test_samples_of_one_classifier_are_folded_into_its_tokens():
    (hidden, weight, bias), target = problem(tokens=24)
    loss = linear_cross_entropy(chunk=50)
    with Largest() as seen:
        found = vmap(grad(lambda h, t: loss((h, weight, bias), t)))(hidden.view(4, 6, 6), target.view(4, 6))
    expected = torch.stack([
        value_and_gradients(naive(), (h, weight, bias), t)[1]
        for h, t in zip(hidden.view(4, 6, 6), target.view(4, 6), strict=True)
    ])  # fmt: skip
    same([found], [expected])
    assert "bmm" not in seen.names
    assert seen.names.count("mm") == 3


def test_nested_vmap_and_a_number_for_each_trial():
    (hidden, weight, bias), target = problem(tokens=24)
    caps, smoothings = torch.tensor([1.0, 3.0]).double(), torch.tensor([0.0, 0.3]).double()

    def one(hidden, target, cap, smoothing):
        return linear_cross_entropy(chunk=2, softcap=cap, label_smoothing=smoothing)((hidden, weight, bias), target)

    found = vmap(vmap(grad(one), (0, 0, None, None)), (None, None, 0, 0))(
        hidden.view(3, 8, 6), target.view(3, 8), caps, smoothings
    )
    turned = vmap(vmap(grad(one), (None, None, 0, 0)), (0, 0, None, None))(
        hidden.view(3, 8, 6), target.view(3, 8), caps, smoothings
    )
    same([turned], [found.transpose(0, 1)])
    for i, (cap, smoothing) in enumerate(zip(caps.tolist(), smoothings.tolist(), strict=True)):
        for j, (h, t) in enumerate(zip(hidden.view(3, 8, 6), target.view(3, 8), strict=True)):
            loss = naive(softcap=cap, label_smoothing=smoothing)
            same([found[i, j]], [value_and_gradients(loss, (h, weight, bias), t)[1]])


def test_its_own_numbers_have_gradients_too():
    prediction, target = problem()
    numbers = {name: torch.tensor(value).double() for name, value in [("softcap", 2.0), ("z_loss", 0.1)]}
    numbers["label_smoothing"] = torch.tensor(0.2).double()
    leaves = [each.clone().requires_grad_() for each in numbers.values()]
    loss = linear_cross_entropy(chunk=2, softcap=1.0)
    found = torch.autograd.grad(loss(prediction, target, numbers=dict(zip(numbers, leaves, strict=True))), leaves)
    for (name, at), ours in zip(numbers.items(), found, strict=True):
        others = {n: v.item() for n, v in numbers.items()}
        above, below = (naive(**{**others, name: at.item() + step})(prediction, target) for step in (1e-6, -1e-6))
        assert abs(ours) > 1e-3
        torch.testing.assert_close(ours, (above - below) / 2e-6, rtol=1e-6, atol=1e-8)


def test_second_derivatives_are_those_of_all_logits():
    prediction, target = problem(tokens=7, depth=3, classes=11)
    along = problem(tokens=7, depth=3, classes=11, seed=1)[0]

    def second(loss):
        leaves = [part.clone().requires_grad_() for part in prediction]
        slopes = torch.autograd.grad(loss(tuple(leaves), target), leaves, create_graph=True)
        return torch.autograd.grad(sum((s * a).sum() for s, a in zip(slopes, along, strict=True)), leaves)

    arguments = {"softcap": 2.0, "z_loss": 0.1, "label_smoothing": 0.1}
    expected = second(naive(**arguments))
    assert all(part.abs().max() > 1e-3 for part in expected)
    for chunk in (1, 3, 100):
        same(second(linear_cross_entropy(chunk=chunk, **arguments)), expected)


def test_second_derivatives_by_its_own_numbers():
    (hidden, weight, bias), target = problem(tokens=7, depth=3, classes=11)
    leaves = [each.double().requires_grad_() for each in (hidden, weight, bias, *torch.tensor([2.0, 0.1, 0.2]))]

    def loss(hidden, weight, bias, *numbers):
        named = dict(zip(("softcap", "z_loss", "label_smoothing"), numbers, strict=True))
        return linear_cross_entropy(chunk=2, softcap=1.0)((hidden, weight, bias), target, numbers=named)

    assert torch.autograd.gradcheck(loss, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(loss, leaves, fast_mode=True)


@pytest.mark.parametrize("chunk", ["auto", 20])
def test_a_traced_population_computes_the_same_numbers(chunk):
    several = [problem(seed=seed) for seed in range(3)]
    stacked = [torch.stack([p[i] for p, _ in several]) for i in range(3)]
    loss = linear_cross_entropy(chunk=chunk, **MANY)

    def step(hidden, weight, bias, target):
        leaves = [part.detach().requires_grad_() for part in (hidden, weight, bias)]
        values = vmap(lambda h, w, b, t: loss((h, w, b), t), in_dims=(0, 0, 0, None))(*leaves, target)
        return values.detach(), *torch.autograd.grad(values.sum(), leaves)

    arguments = *stacked, several[0][1]
    same(trace(step, *arguments)(*arguments), step(*arguments))


@pytest.mark.parametrize("chunk", ["auto", 3])
def test_where_all_is_ignored_the_loss_is_zero(chunk):
    prediction, target = problem()
    loss = linear_cross_entropy(chunk=chunk, z_loss=0.1, label_smoothing=0.1)
    for part in value_and_gradients(loss, prediction, torch.full_like(target, -100)):
        assert (part == 0).all()
    none = value_and_gradients(loss, (prediction[0][:0], *prediction[1:]), target[:0])
    assert none[0] == 0


def test_an_ignored_token_has_no_gradient_and_changes_nothing():
    (hidden, weight, bias), target = problem()
    rest = value_and_gradients(linear_cross_entropy(z_loss=0.1), (hidden[1:], weight, bias), target[1:])
    target[0] = -100
    hidden[0] = 1e3
    found = value_and_gradients(linear_cross_entropy(chunk=3, z_loss=0.1), (hidden, weight, bias), target)
    assert (found[1][0] == 0).all()
    same([found[0], found[1][1:], *found[2:]], rest)


@pytest.mark.parametrize("chunk", ["auto", 3])
@pytest.mark.parametrize("label", [23, -1])
def test_a_label_that_is_no_class_is_refused(chunk, label):
    prediction, target = problem()
    target[4] = label
    with pytest.raises((IndexError, RuntimeError), match=r"out of bounds|index"):
        linear_cross_entropy(chunk=chunk)(prediction, target)


def test_a_label_that_is_no_class_is_refused_in_a_traced_program():
    (hidden, weight, _), target = problem()
    traced = trace(lambda h, w, t: linear_cross_entropy(chunk=100)((h, w), t), hidden, weight, target)
    same([traced(hidden, weight, target)], [linear_cross_entropy()((hidden, weight), target)])
    target[4] = 23
    with pytest.raises((IndexError, RuntimeError), match=r"out of bounds|index"):
        traced(hidden, weight, target)


@pytest.mark.parametrize("chunk", ["auto", 3])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_under_autocast_it_multiplies_in_the_chosen_type_and_gives_float32(chunk, smoothing):
    prediction, target = problem(dtype=torch.float32, scale=3.0)
    rounded = [part.bfloat16().float() for part in prediction]
    loss = linear_cross_entropy(chunk=chunk, label_smoothing=smoothing, reduction="none")
    reference = naive(label_smoothing=smoothing, reduction="none")
    expected, exact = (value_and_gradients(reference, given, target) for given in (rounded, prediction))
    assert (expected[0] - exact[0]).abs().max() > 1e-3, "the types make a difference"
    leaves = [part.clone().requires_grad_() for part in prediction]
    with torch.autocast("cpu", torch.bfloat16):
        values = loss(tuple(leaves), target)
        assert loss([part.bfloat16() for part in prediction], target).dtype == torch.float32
    same([values.detach()], [expected[0]], rtol=1e-5, atol=1e-5)
    slopes = torch.autograd.grad(values, leaves, torch.linspace(0.5, 1.5, len(values)))
    same(slopes, expected[1:], rtol=1e-2, atol=1e-2)


def test_autocast_leaves_float64_as_it_is():
    prediction, target = problem()
    with torch.autocast("cpu", torch.bfloat16):
        found = [linear_cross_entropy(chunk=chunk)(prediction, target) for chunk in ("auto", 3)]
    same(found, [naive()(prediction, target)] * 2)


def test_hidden_states_of_half_precision_go_with_a_classifier_in_float32():
    (hidden, weight, bias), target = problem(dtype=torch.float32)
    found = value_and_gradients(linear_cross_entropy(chunk=3), (hidden.bfloat16(), weight, bias), target)
    expected = value_and_gradients(naive(), (hidden.bfloat16().float(), weight, bias), target)
    assert [part.dtype for part in found] == [torch.float32, torch.bfloat16, torch.float32, torch.float32]
    same([found[0], *found[2:]], [expected[0], *expected[2:]], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("prediction", "target", "words"),
    [
        (torch.zeros(4, 3), torch.zeros(4).long(), "tensor of shape \\[4, 3\\]"),
        ((torch.zeros(4, 3), torch.zeros(3, 5)), torch.zeros(4).long(), "\\[3, 5\\]"),
        ((torch.zeros(4, 3), torch.zeros(5, 3)), torch.zeros(4, 1).long(), "class index for each hidden state"),
        ((torch.zeros(4, 3), torch.zeros(5, 3)), torch.zeros(4, 5), "class probabilities"),
        ((torch.zeros(4, 3), torch.zeros(5, 3)), torch.zeros(4), "float32"),
        ((torch.zeros(4, 3), torch.zeros(5, 3), torch.zeros(4)), torch.zeros(4).long(), "bias of shape \\[4\\]"),
    ],
)
def test_what_does_not_fit_together_is_refused(prediction, target, words):
    with pytest.raises(LossMismatch, match=words):
        linear_cross_entropy()(prediction, target)


def test_class_weights_of_the_wrong_number_are_refused():
    with pytest.raises(LossMismatch, match="2 class weights"):
        linear_cross_entropy(weight=[1.0, 2.0])(*problem())


@pytest.mark.parametrize(("tokens", "classes"), [(1, 1), (5, 10**6), (10**6, 5), (4096, 32768), (3000, 1000)])
@pytest.mark.parametrize("limit", [1, 7, 10**4, 1 << 21])
def test_a_tile_is_never_larger_than_allowed_and_uses_most_of_it(tokens, classes, limit):
    height, width = tiles.tile_shape(tokens, classes, limit)
    assert 1 <= height <= tokens
    assert 1 <= width <= classes
    assert height * width <= limit
    assert height * width > min(limit, tokens * classes) / 2


@with_kernel
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of NumPy, by Triton's interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("shape", "biased", "cap", "smooths"),
    [
        ((150, 40, 700), True, None, False),
        ((130, 33, 257), False, 5.0, True),
        ((1, 100, 1000), True, torch.tensor(2.0), False),
        ((200, 16, 5), True, 30.0, True),
        ((140, 1, 300), True, None, True),
    ],
)
def test_the_kernel_is_as_near_to_float64_as_the_tiles(shape, biased, cap, smooths, dtype, monkeypatch):
    if dtype == torch.bfloat16 and not torch.cuda.is_available():
        pytest.skip("Triton's interpreter multiplies bfloat16 wrongly")
    from fallline.losses import vocabulary_triton as kernels

    if torch.cuda.is_available():  # without, the attribute can be read and not be put back
        monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    monkeypatch.setattr(kernels, "PROGRAMS", 6)  # several shares of several blocks
    device = "cuda" if torch.cuda.is_available() else "cpu"
    (hidden, weight, bias), target = problem(*shape, dtype=dtype)
    if not smooths:
        bias[target.min() + 1 :: 7] = -torch.inf
        bias[target] = 1.0
    class_weights = torch.linspace(0.5, 2, shape[2])
    given = [each.to(device) for each in (hidden, weight, bias, target, class_weights)]
    given[2] = given[2] if biased else None
    wide = [None if each is None else each if each.dtype == torch.int64 else each.double() for each in given]

    def found(of, kernel):
        monkeypatch.setattr(tiles, "_has_kernel", lambda *_: kernel)
        return tiles._Statistics.apply(*of, cap, smooths, 1000)

    truth, chunked, ours = found(wide, False), found(given, False), found(given, True)
    for exact, a, b in zip(truth, chunked, ours, strict=True):
        budget = (a - exact).abs().max() + 1e-6 * exact.abs().max()
        assert (b - exact).abs().max() <= 2 * budget


@on_a_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scale", [0.3, 10.0])
def test_on_a_gpu_the_error_is_no_greater_than_on_all_logits(dtype, scale, monkeypatch):
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    squares = torch.zeros(2, 4, dtype=torch.float64)
    for seed in range(8):
        prediction, target = problem(300, 128, 5000, seed, scale, dtype)
        prediction, target = [part.cuda() for part in prediction], target.cuda()
        assert tiles._has_kernel(prediction[0], prediction[1])
        truth = value_and_gradients(naive(reduction="none"), [part.double() for part in prediction], target)
        theirs = value_and_gradients(naive(reduction="none"), prediction, target)
        ours = value_and_gradients(linear_cross_entropy(reduction="none", chunk=20), prediction, target)
        for i, (a, b, exact) in enumerate(zip(ours, theirs, truth, strict=True)):
            squares[0, i] += ((a.double() - exact).norm() / exact.norm()).cpu() ** 2
            squares[1, i] += ((b.double() - exact).norm() / exact.norm()).cpu() ** 2
    assert ((squares[0] / squares[1]).sqrt() <= 1.05).all(), (squares[0] / squares[1]).sqrt()


@on_a_gpu
def test_on_a_gpu_the_kernel_equals_the_tiles_and_saves_the_memory(monkeypatch):
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    prediction, target = problem(2048, 64, 20000, dtype=torch.float32)
    prediction, target = [part.cuda() for part in prediction], target.cuda()
    loss = linear_cross_entropy(label_smoothing=0.1, z_loss=1e-3, softcap=20.0, chunk=100)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    by_kernel = value_and_gradients(loss, prediction, target)
    assert torch.cuda.max_memory_allocated() - before < 2048 * 20000 * 4 / 2
    monkeypatch.setattr(tiles, "_has_kernel", lambda *_: False)
    same(by_kernel, value_and_gradients(loss, prediction, target), rtol=1e-4, atol=1e-6)
