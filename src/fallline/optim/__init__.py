"""How the loss is minimised: transforms, the optimizers made of them, schedules, and the torch adapter.

Read `base` for what an optimizer is, `transforms` for the stages, `optimizers` for the named ones.
"""

from fallline.optim import schedules
from fallline.optim.base import Optimizer, State, Transform, chain, per_tensor
from fallline.optim.description import described
from fallline.optim.optimizers import adam, adamw, lion, rmsprop, sgd
from fallline.optim.schedules import Schedule
from fallline.optim.transforms import (
    add_decayed_weights,
    clip_by_global_norm,
    negate,
    scale_by_adam,
    scale_by_learning_rate,
    scale_by_lion,
    scale_by_rms,
    trace,
)

__all__ = [
    "Optimizer",
    "Schedule",
    "State",
    "Transform",
    "adam",
    "adamw",
    "add_decayed_weights",
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
