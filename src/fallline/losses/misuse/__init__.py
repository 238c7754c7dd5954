"""What is wrong with a loss, a prediction and a target. `finding` says what a finding is; `check` finds them; `checked`
puts the check into a training loop."""

from fallline.losses.misuse.check import check, require
from fallline.losses.misuse.checked import checked
from fallline.losses.misuse.finding import CODES, Finding

__all__ = ["CODES", "Finding", "check", "checked", "require"]
