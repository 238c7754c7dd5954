"""What a finding is, and the list of codes. `check` makes findings; its neighbours hold the rules, by subject."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

Severity: TypeAlias = Literal["error", "warning", "note"]

# A code, once published, keeps its meaning.
CODES: Mapping[str, str] = {
    "all-ignored": "Every label of the batch equals ignore_index or has the weight 0: there is nothing to average.",
    "axis": "The classes, the samples or the positions stand in another dimension than the loss reads.",
    "batch-size": "The prediction and the target hold different numbers of samples.",
    "broadcast": "Shapes that differ would be broadcast: every prediction is compared with every target.",
    "class-weights": "Weights of classes of the wrong number, 0, negative or not finite.",
    "collapsed": "Embeddings or outputs that are all equal, of length 0, or the same tensor twice.",
    "constant-target": "Every target of the batch is the same.",
    "detached": "No gradient can flow back: no graph, integers instead of outputs, or a value that is no tensor.",
    "domain": "Values that the loss is not defined for, such as negative counts or variances.",
    "double-sigmoid": "Probabilities of yes where logits are expected: the loss applies the sigmoid once more.",
    "double-softmax": "Class probabilities where logits are expected: the loss applies the softmax once more.",
    "empty": "A tensor without elements: its mean is NaN.",
    "fails": "Computing the loss raises an error.",
    "ignored-class": "ignore_index is the number of a class that occurs in the target.",
    "ignored-target": "A target of class labels beside a loss that takes no target.",
    "imbalance": "Nearly all targets are of one class.",
    "label-range": "A label below 0 or beyond the last class.",
    "log-softmax-twice": "Log-probabilities where logits are expected: harmless, the second one changes nothing.",
    "not-finite": "NaN or infinity in what is given, in the loss or in its gradient.",
    "not-log-probabilities": "Logits or probabilities where log-probabilities are expected.",
    "not-normalised": "Probabilities of a target that do not sum to 1.",
    "not-probabilities": "Logits or log-probabilities where probabilities are expected.",
    "one-class": "A softmax over a single class, which is always 1: the loss is constant.",
    "reduction": "The reduction makes another number of the values than is usually meant.",
    "rewards-errors": "The loss falls when the prediction moves away from the target.",
    "saturated": "Predictions at the end of their range and wrong, where the gradient is (nearly) 0.",
    "scale": "Targets on a scale far from the predictions'.",
    "shape": "Shapes that cannot be compared.",
    "softmax-axis": "A softmax over the wrong axis: the batch, the positions or all of the tensor.",
    "swapped": "The prediction and the target stand in each other's place.",
    "target-coding": "A target in another coding than the loss reads: −1 and 1, one-hot rows, bytes, indices.",
    "target-type": "A target of another number type than the loss reads.",
    "zero-gradient": "Parameters, or all of the prediction, whose gradient is exactly 0 or missing.",
}
"""Every code that a finding can have, and what it means."""


@dataclass(frozen=True)
class Finding:
    """Something about a loss and what it is given, or about a task, that is worth knowing.

    Attributes:
        severity: "error" (what is computed is not what is meant; training is refused), "warning" (very likely a
            mistake) or "note" (worth knowing, often intended).
        code: a stable name, such as "double-softmax"; `CODES` says what each means.
        seen: what was seen, with numbers, in one sentence.
        why: why it matters, in one sentence.
        fix: a line of code that mends it.

    >>> Finding("error", "broadcast", "Shapes [8, 1] and [8].", "They make 64 pairs.", "target.unsqueeze(1)").message
    'Shapes [8, 1] and [8]. They make 64 pairs.'
    """

    severity: Severity
    code: str
    seen: str
    why: str
    fix: str

    @property
    def message(self) -> str:
        """What was seen and why it matters."""
        return f"{self.seen} {self.why}"

    def __str__(self) -> str:
        return f"{self.severity} [{self.code}] {self.message} Fix: {self.fix}"


def error(code: str, seen: str, why: str, fix: str) -> Finding:
    """What is computed cannot be what is meant."""
    return Finding("error", code, seen, why, fix)


def warning(code: str, seen: str, why: str, fix: str) -> Finding:
    """Very likely a mistake."""
    return Finding("warning", code, seen, why, fix)


def note(code: str, seen: str, why: str, fix: str) -> Finding:
    """Worth knowing, often intended."""
    return Finding("note", code, seen, why, fix)


def errors_among(findings: Iterable[Finding]) -> list[Finding]:
    """The findings that refuse training."""
    return [finding for finding in findings if finding.severity == "error"]


def not_yet_said(findings: Iterable[Finding], told: Iterable[Finding]) -> list[Finding]:
    """The findings of whose codes none was told."""
    said = {finding.code for finding in told}
    return [finding for finding in findings if finding.code not in said]


def by_severity(findings: Iterable[Finding]) -> list[Finding]:
    """The findings, each once, errors first."""
    order = {"error": 0, "warning": 1, "note": 2}
    return sorted(dict.fromkeys(findings), key=lambda finding: order[finding.severity])
