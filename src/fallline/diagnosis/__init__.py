"""Why a task trains as it does. `sanity` makes the checks that experts make by hand before they train."""

from fallline.diagnosis.sanity import Outcome, check, examine

__all__ = ["Outcome", "check", "examine"]
