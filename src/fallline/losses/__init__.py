"""What is minimised. `base` says what a loss is; `regression` and `classification` hold the losses; `checks`
says what can be said against their arguments; `wrapped` accepts torch's own losses and any callable."""

from fallline.losses.base import Loss
from fallline.losses.classification import binary_cross_entropy_with_logits, cross_entropy
from fallline.losses.regression import huber, l1, mse
from fallline.losses.wrapped import as_loss, get, registry

__all__ = [
    "Loss",
    "as_loss",
    "binary_cross_entropy_with_logits",
    "cross_entropy",
    "get",
    "huber",
    "l1",
    "mse",
    "registry",
]
