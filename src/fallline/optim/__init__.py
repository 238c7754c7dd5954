"""How the loss is minimised: transforms, the optimizers made of them, schedules, and the torch adapter.

Read `transform` for what a stage is, `base` for what an optimizer is, then any family: `gradient_descent`,
`adam_family`, `adam_variants`, `mean_square`, `signs`, `layerwise`, `matrices`, `preconditioners`, `schedule_free`,
`learning_rate_free`, `variance_reduced`, `curvature`. `transforms`, `combinators` and `partitions` hold what they are
composed with, `new_rule` the decorator for your own.
"""

from fallline.description import described
from fallline.optim import catalogue, schedules
from fallline.optim.adam_family import (
    adam,
    adamax,
    adamw,
    nadam,
    radam,
    scale_by_adam,
    scale_by_adamax,
    scale_by_nadam,
    scale_by_radam,
)
from fallline.optim.adam_variants import (
    adabelief,
    adan,
    ademamix,
    scale_by_adabelief,
    scale_by_adan,
    scale_by_ademamix,
    scale_by_proximal_learning_rate,
    scale_by_yogi,
    yogi,
)
from fallline.optim.base import Optimizer, State, chain
from fallline.optim.combinators import accumulate, cautious, lookahead, skip_not_finite
from fallline.optim.curvature import sam, scale_by_sophia, sophia
from fallline.optim.gradient_descent import asgd, rprop, scale_by_asgd, scale_by_rprop, sgd
from fallline.optim.landscape import Landscape
from fallline.optim.layerwise import lamb, lars, scale_by_lamb, scale_by_lars
from fallline.optim.learning_rate_free import d_adaptation, prodigy, scale_by_d_adaptation, scale_by_prodigy
from fallline.optim.matrices import (
    adafactor,
    clip_by_rms,
    muon,
    scale_by_capped_learning_rate,
    scale_by_factored_rms,
    scale_by_muon,
    scale_by_parameter_rms,
)
from fallline.optim.mean_square import (
    adadelta,
    adagrad,
    rmsprop,
    scale_by_adadelta,
    scale_by_inverse_time,
    scale_by_rms,
    scale_by_root_of_sum,
)
from fallline.optim.new_rule import rule
from fallline.optim.noise import add_noise
from fallline.optim.partitions import by_name, by_shape, muon_with_adamw, no_decay_on_vectors, partition
from fallline.optim.preconditioners import scale_by_shampoo, scale_by_soap, shampoo, soap
from fallline.optim.schedule_free import (
    scale_by_second_moment,
    schedule_free_adamw,
    schedule_free_sgd,
    schedule_free_step,
)
from fallline.optim.schedules import Schedule
from fallline.optim.signs import lion, scale_by_lion
from fallline.optim.torch_own import from_torch
from fallline.optim.transform import Transform, per_tensor
from fallline.optim.transforms import (
    add_decayed_weights,
    centralize,
    clip_by_global_norm,
    clip_by_norm,
    clip_by_value,
    ema_of_parameters,
    negate,
    scale_by_learning_rate,
    trace,
)
from fallline.optim.variance_reduced import mars, scale_by_mars

__all__ = [
    "Landscape",
    "Optimizer",
    "Schedule",
    "State",
    "Transform",
    "accumulate",
    "adabelief",
    "adadelta",
    "adafactor",
    "adagrad",
    "adam",
    "adamax",
    "adamw",
    "adan",
    "add_decayed_weights",
    "add_noise",
    "ademamix",
    "asgd",
    "by_name",
    "by_shape",
    "catalogue",
    "cautious",
    "centralize",
    "chain",
    "clip_by_global_norm",
    "clip_by_norm",
    "clip_by_rms",
    "clip_by_value",
    "d_adaptation",
    "described",
    "ema_of_parameters",
    "from_torch",
    "lamb",
    "lars",
    "lion",
    "lookahead",
    "mars",
    "muon",
    "muon_with_adamw",
    "nadam",
    "negate",
    "no_decay_on_vectors",
    "partition",
    "per_tensor",
    "prodigy",
    "radam",
    "rmsprop",
    "rprop",
    "rule",
    "sam",
    "scale_by_adabelief",
    "scale_by_adadelta",
    "scale_by_adam",
    "scale_by_adamax",
    "scale_by_adan",
    "scale_by_ademamix",
    "scale_by_asgd",
    "scale_by_capped_learning_rate",
    "scale_by_d_adaptation",
    "scale_by_factored_rms",
    "scale_by_inverse_time",
    "scale_by_lamb",
    "scale_by_lars",
    "scale_by_learning_rate",
    "scale_by_lion",
    "scale_by_mars",
    "scale_by_muon",
    "scale_by_nadam",
    "scale_by_parameter_rms",
    "scale_by_prodigy",
    "scale_by_proximal_learning_rate",
    "scale_by_radam",
    "scale_by_rms",
    "scale_by_root_of_sum",
    "scale_by_rprop",
    "scale_by_second_moment",
    "scale_by_shampoo",
    "scale_by_soap",
    "scale_by_sophia",
    "scale_by_yogi",
    "schedule_free_adamw",
    "schedule_free_sgd",
    "schedule_free_step",
    "schedules",
    "sgd",
    "shampoo",
    "skip_not_finite",
    "soap",
    "sophia",
    "trace",
    "yogi",
]
