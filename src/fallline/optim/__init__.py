"""How the loss is minimised: transforms, the optimizers made of them, schedules, and the torch adapter.

Read `base` for what an optimizer is, `transforms` for the stages, `optimizers` for the named ones.
"""

from fallline.optim import schedules
from fallline.optim.adam_family import adam, adamw, scale_by_adam
from fallline.optim.base import Optimizer, State, chain
from fallline.optim.combinators import cautious
from fallline.optim.description import described
from fallline.optim.gradient_descent import sgd
from fallline.optim.landscape import Landscape
from fallline.optim.mean_square import rmsprop, scale_by_rms
from fallline.optim.schedules import Schedule
from fallline.optim.signs import lion, scale_by_lion
from fallline.optim.transform import Transform, per_tensor
from fallline.optim.transforms import (
    add_decayed_weights,
    clip_by_global_norm,
    negate,
    scale_by_learning_rate,
    trace,
)

__all__ = [
    "Landscape",
    "Optimizer",
    "Schedule",
    "State",
    "Transform",
    "adam",
    "adamw",
    "add_decayed_weights",
    "cautious",
    "chain",
    "clip_by_global_norm",
    "described",
    "lion",
    "negate",
    "per_tensor",
    "rmsprop",
    "scale_by_adam",
    "scale_by_learning_rate",
    "scale_by_lion",
    "scale_by_rms",
    "schedules",
    "sgd",
    "trace",
]
