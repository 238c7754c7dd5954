"""Every loss that torch has too, over all the sample inputs of torch's own data base of modules, in float64.

Ours is called as torch's module is, and compared in value and gradient with the module and with the sample's reference
function. `TripletMarginLoss` and its kin are not in torch's data base; tests/losses/test_embeddings.py holds them to
torch's modules.
"""

from __future__ import annotations

import inspect
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.testing._internal import common_modules
from torch.testing._internal.common_modules import module_db

from fallline.losses.base import Loss
from fallline.losses.catalogue import registry

CLOSE = {"rtol": 1e-10, "atol": 1e-10}

DATABASE = {each.module_cls.__name__: each for each in module_db if issubclass(each.module_cls, nn.modules.loss._Loss)}
# What torch's data base has and our catalogue has not under that class, and why.
OUTSIDE = {
    "LinearCrossEntropyLoss": "holds weights of its own, which ours is given: compared by itself below",
}
# The modules whose derivative is not that of their value: they are compared through what they assume.
ASSUMES = {"CTCLoss": lambda log_probs: log_probs.log_softmax(-1)}


def makers():
    """Our maker of each of torch's losses, by the name of torch's class."""
    found = {}
    for maker in registry.values():
        parameters = inspect.signature(maker).parameters.values()
        if all(each.default is not each.empty for each in parameters) and maker().torch_name:
            found[maker().torch_name] = maker
    return found


# Reference functions of torch's that cannot be differentiated: their values are compared.
VALUES_ONLY = {
    "BCEWithLogitsLoss": "overwrites what its gradient needs",
    "NLLLoss": "reads elements as Python numbers",
}

MAKERS = makers()
BOTH = sorted(MAKERS.keys() & DATABASE.keys())


def samples_of(name):
    info = DATABASE[name]
    torch.manual_seed(0)
    return list(info.module_inputs_func(info, "cpu", torch.float64, True, training=True))


def inputs_of(name, sample):
    """The forward arguments; kl_div's are logarithms of numbers of either sign, mostly NaN, and get finite values."""
    inputs = sample.forward_input.args
    if name != "KLDivLoss":
        return inputs
    log_probs, target = (each.detach().nan_to_num(nan=-1.0) for each in inputs)
    given = target if sample.constructor_input.kwargs.get("log_target") else target.exp()
    return log_probs.requires_grad_(), given.requires_grad_()


def ours_for(name, given) -> Loss:
    names = list(inspect.signature(getattr(nn, name)).parameters)
    # torch's default of kl_div is not the divergence, and not ours.
    arguments = {"reduction": "mean"} | dict(zip(names, given.args, strict=False)) | given.kwargs
    return MAKERS[name](**arguments)


def copied(inputs):
    """The inputs with leaves of their own, and those leaves that can have a gradient."""
    made = [
        each.detach().clone().requires_grad_(each.requires_grad) if torch.is_tensor(each) else each for each in inputs
    ]
    return made, [each for each in made if isinstance(each, Tensor) and each.requires_grad]


def value_and_gradients(function, inputs, through=None):
    """The value, and the gradients of a fixed weighting of its elements in each input that requires one."""
    made, leaves = copied(inputs)
    value = function(*([through(made[0]), *made[1:]] if through else made))
    spread = torch.linspace(0.5, 1.5, value.numel(), dtype=value.dtype).reshape(value.shape)
    gradients = torch.autograd.grad((value * spread).sum(), leaves, allow_unused=True)
    return value.detach(), [
        torch.zeros_like(leaf) if found is None else found for leaf, found in zip(leaves, gradients, strict=True)
    ]


def same(ours, theirs, what):
    torch.testing.assert_close(ours[0], theirs[0], **CLOSE, msg=lambda text: f"{what}: value: {text}")
    assert len(ours[1]) == len(theirs[1]) > 0
    for a, b in zip(ours[1], theirs[1], strict=True):
        torch.testing.assert_close(a, b, **CLOSE, msg=lambda text: f"{what}: gradient: {text}")


@pytest.mark.filterwarnings("ignore:reduction. 'mean' divides:UserWarning")  # torch's kl_div about its own default
@pytest.mark.parametrize("name", BOTH)
def test_values_and_gradients_are_torchs_over_its_whole_data_base(name, monkeypatch):
    # The reference functions are given deep copies, through which no gradient comes back.
    monkeypatch.setattr(common_modules, "deepcopy", lambda arguments: arguments)
    samples = samples_of(name)
    assert len(samples) > 3
    steepest, references = 0.0, 0
    for sample in samples:
        arguments = sample.constructor_input
        loss, module = ours_for(name, arguments), getattr(nn, name)(*arguments.args, **arguments.kwargs).double()
        inputs = inputs_of(name, sample)
        assert not sample.forward_input.kwargs
        through = ASSUMES.get(name)
        ours = value_and_gradients(loss, inputs, through)
        theirs = value_and_gradients(module, inputs, through)
        if theirs[0].isnan().any():  # torch's mean over nothing; ours is documented to be 0
            assert (inputs[1] == module.ignore_index).all()
            assert ours[0] == 0
            assert all((slope == 0).all() for slope in ours[1])
            continue
        same(ours, theirs, f"{sample.desc} {arguments.kwargs}")
        steepest = max(steepest, *(float(slope.abs().max()) for slope in ours[1]))
        if sample.reference_fn is not None:  # with a plain derivative, even where the module has another
            reference = partial(sample.reference_fn, module)
            if name in VALUES_ONLY:
                plain = [each.detach() if torch.is_tensor(each) else each for each in inputs]
                torch.testing.assert_close(loss(*plain), reference(*plain), **CLOSE)
            else:
                theirs = value_and_gradients(reference, inputs)
                same(value_and_gradients(loss, inputs), theirs, f"{sample.desc} {arguments.kwargs}, reference")
            references += 1
    assert steepest > 1e-3, "gradients of zero would prove nothing"
    assert references > 0


def test_every_loss_of_torchs_data_base_is_here_or_said_to_be_outside():
    assert len(DATABASE) >= 20
    assert DATABASE.keys() - MAKERS.keys() == OUTSIDE.keys()


@pytest.mark.filterwarnings("ignore:linear_cross_entropy. ``options`` ignored:UserWarning")
@pytest.mark.skipif("linear_cross_entropy" not in registry, reason="not in the catalogue")
def test_linear_cross_entropy_is_torchs_over_its_data_base():
    compared, steepest = 0, 0.0
    for sample in samples_of("LinearCrossEntropyLoss"):
        arguments = sample.constructor_input.kwargs
        hidden, target = sample.forward_input.args
        if arguments["out_features"] or target.is_floating_point():
            continue  # several classifiers at once, or class probabilities: ours takes one, and indices
        torch.manual_seed(1)
        module = nn.LinearCrossEntropyLoss(*sample.constructor_input.args, **arguments)
        names = ("weight", "reduction", "label_smoothing", *(["ignore_index"] if arguments["ignore_index"] else []))
        loss = registry["linear_cross_entropy"](**{name: arguments[name] for name in names})
        held = [each.detach().clone().requires_grad_() for each in module.parameters()]

        def theirs(hidden, target, *held, module=module):
            given = dict(zip((name for name, _ in module.named_parameters()), held, strict=True))
            return torch.func.functional_call(module, given, (hidden, target))

        def ours(hidden, target, *held, loss=loss):
            return loss((hidden, *held), target)

        found = value_and_gradients(ours, (hidden, target, *held))
        assert len(found[1]) >= 2
        same(found, value_and_gradients(theirs, (hidden, target, *held)), f"{sample.desc} {arguments}")
        compared += 1
        steepest = max(steepest, *(float(slope.abs().max()) for slope in found[1]))
    assert compared > 400
    assert steepest > 1e-2
