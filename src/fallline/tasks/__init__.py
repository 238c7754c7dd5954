"""What is trained. `task` says what a task is, `data` makes tensors of what users give, `metrics` holds the
yardsticks, `resolution` finds tasks by name; the built-in ones are in `tabular`, `signals`, `quadratic`,
`text`."""

from fallline.tasks.data import Data
from fallline.tasks.metrics import Metric
from fallline.tasks.quadratic import quadratic_deep
from fallline.tasks.resolution import describe_builtins, registry, resolve
from fallline.tasks.signals import mnist1d, mnist1d_cnn
from fallline.tasks.tabular import diabetes, digits, digits_cnn, line, two_moons
from fallline.tasks.task import Task
from fallline.tasks.text import char_lm

__all__ = [
    "Data",
    "Metric",
    "Task",
    "char_lm",
    "describe_builtins",
    "diabetes",
    "digits",
    "digits_cnn",
    "line",
    "mnist1d",
    "mnist1d_cnn",
    "quadratic_deep",
    "registry",
    "resolve",
    "two_moons",
]
