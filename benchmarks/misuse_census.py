"""How many misuses of losses torch and fallline catch with the right reason, and how often they cry wolf.

    python benchmarks/misuse_census.py [--torch-only] [--each] [--list] [--only WORD] [--seed 0] [--markdown]

Every misuse and every correct use is a small function in benchmarks/census. torch is asked by running the loss and
its gradient: it has caught a misuse when it warns or raises with a message that names the problem, which a regular
expression decides. fallline is asked by `fallline.losses.check`: it has caught a misuse when a finding has the code
that names it, at the severity that the case asks for. A correct use is flagged by torch when it warns or raises, by
fallline when there is a finding. The check must also leave everything as it was: parameters, gradients, modes, random
numbers, and the graph of the prediction.

The exit status is 1 unless every misuse is caught, no correct use is flagged as an error and at most 2 % as a warning.
"""

from __future__ import annotations

import argparse
import platform
import sys
from collections.abc import Iterable
from pathlib import Path

import torch
from rich.console import Console

sys.path.insert(0, str(Path(__file__).resolve().parent))

import census.correct_by_hand
import census.correct_of_classes
import census.correct_of_embeddings
import census.correct_of_sequences
import census.correct_of_training
import census.correct_of_values
import census.correct_second
import census.correct_third
import census.misuses_of_batches
import census.misuses_of_classes
import census.misuses_of_labels
import census.misuses_of_training
import census.misuses_of_values
import census.misuses_second
import census.misuses_third  # noqa: F401
from census.case import CORRECT_USES, MISUSES, Case
from census.tables import (
    Census,
    correct_rows,
    each_correct_use,
    each_misuse,
    failures,
    in_markdown,
    in_terminal,
    misuse_rows,
    summary,
)
from census.verdicts import fallline_verdict, torch_verdict
from fallline.losses.misuse.finding import CODES

INTRODUCTION = """# Misused losses, and who notices

Made by `python benchmarks/misuse_census.py --markdown > docs/misuse.md`; run it yourself.

`fl.losses.check(loss, prediction, target, model)` looks at a loss and at one batch before the first step, and says what
is wrong, why it matters, and the line that mends it. It takes fallline's losses, torch's modules and functions, and any
callable.

```python
import torch
import fallline as fl

prediction, target = torch.randn(64, 1), torch.randn(64)
for finding in fl.losses.check(torch.nn.MSELoss(), prediction, target):
    print(finding)  # error [broadcast] …
```

A finding is an *error* (what is computed is not what is meant), a *warning* (very likely a mistake) or a *note* (worth
knowing, often intended). Each has a stable code.

The census asks torch and fallline about misuses and about correct uses, odd ones among them, each a small function in
`benchmarks/census`. torch is asked by running the loss and its gradient: it gives *the reason* when a warning or an
error names the problem, and *something else* when it stops without naming it. fallline has caught a misuse when a
finding has the code that names it, as an error or a warning; a note is enough where the same data may also be meant,
such as a batch with one label. Where torch has no such loss, it is not counted.

## How far the figures can be trusted

The figures below are no estimate of how the check does on code that nobody here has seen: it was written while this
census ran, by people who could read the cases, and was mended until they passed: it is fitted to them. The
expectations were revised as well after results had been seen. What was found on the first run, before anything was
mended for those cases:

| collection | misuses caught | correct uses: errors | warnings |
| --- | --: | --: | --: |
| first (seed 0; its cases could be read while the check was written) | 181 of 198 | 1 of 181 | 3 |
| second (seeds 0, 1 and 2 alike; written after the check fitted the first) | 17 of 20 | 1 of 16 | 1 |
| third (by an independent tester; written after the check fitted both) | 137 of 151 | 2 of 190 | 7 |

The second collection was written by someone who knew by then what the check rests on, to be hard on it. Its cases are
in `misuses_second.py` and `correct_second.py`, and as soon as the check is mended for them they are as used up as the
others: a new estimate needs new cases. The third was written by an independent tester. Of its 151 misuses and 190
correct uses, this census holds most of those that the check got wrong, and more of the tester's like them
(`misuses_third.py` and `correct_third.py`); they were added after the check had been mended for them, so that the
tables below say nothing about new ones. What torch says was never fitted, but the regular expressions that judge its
messages were widened, in its favour, after reading them.

The tables are of seed 0. After the check had been mended for all three, of the seeds 0 to 4 seed 3 had one miss, bare
probabilities of which nothing was said, and no seed had a correct use refused.

A check sees one batch and no intention. What it cannot tell apart, it says as a warning or not at all: logits that
happen to lie between 0 and 1 look like probabilities, and fresh logits [N, T, C] with T = C look right either way.
"""


def taken(misuses: Iterable[Case], correct_uses: Iterable[Case], *, seed: int, torch_only: bool) -> Census:
    """The census of these cases."""
    misuses, correct_uses = list(misuses), list(correct_uses)
    ours = {}
    if not torch_only:
        from fallline.losses.misuse.check import check

        ours = {case: fallline_verdict(case, check, seed) for case in (*misuses, *correct_uses)}
    return Census(
        {case: torch_verdict(case, seed) for case in misuses},
        {case: torch_verdict(case, seed) for case in correct_uses},
        ours,
    )


def print_markdown(census: Census) -> None:
    """docs/misuse.md."""
    print(INTRODUCTION)
    print("## In all\n")
    for line in summary(census):
        print(f"- {line}")
    print(f"\nPython {platform.python_version()}, torch {torch.__version__}.\n\n## What the codes mean\n")
    print(in_markdown(("code", "what it says"), [(f"`{code}`", meaning) for code, meaning in CODES.items()]))
    for title, table in (
        ("Misuses, by code", misuse_rows),
        ("Correct uses, by subject", correct_rows),
        ("Each misuse", each_misuse),
        ("Each correct use", each_correct_use),
    ):
        print(f"\n## {title}\n")
        print(in_markdown(*table(census)))


def print_tables(console: Console, census: Census, *, each: bool) -> None:
    """The tables, the figures, and what failed."""
    console.print(in_terminal("Misuses, by the code that names them", *misuse_rows(census)), "")
    console.print(in_terminal("Correct uses", *correct_rows(census)), "")
    if each:
        console.print(in_terminal("Each misuse", *each_misuse(census)), "")
        console.print(in_terminal("Each correct use", *each_correct_use(census)), "")
    for line in (*summary(census), *failures(census)):
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def main() -> int:
    """Runs the census and prints it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torch-only", action="store_true", help="do not ask fallline")
    parser.add_argument("--list", action="store_true", help="list the cases without running them")
    parser.add_argument("--each", action="store_true", help="a row for each case, too")
    parser.add_argument("--messages", action="store_true", help="what torch and fallline said, word for word")
    parser.add_argument("--markdown", action="store_true", help="print what stands in docs/misuse.md")
    parser.add_argument("--only", default="", metavar="WORD", help="cases whose name, code or group contains this")
    parser.add_argument("--seed", type=int, default=0, help="other draws of the same cases")
    options = parser.parse_args()
    chosen = [
        [case for case in register.values() if options.only in " ".join((case.name, case.group, *case.codes))]
        for register in (MISUSES, CORRECT_USES)
    ]
    console = Console(width=None if sys.stdout.isatty() else 140)
    if options.list:
        for title, cases in zip(("Misuses", "Correct uses"), chosen, strict=True):
            rows = [[case.group, case.name, case.sentence] for case in cases]
            console.print(in_terminal(f"{title}: {len(rows)}", ["group", "name", "what it shows"], rows), "")
        return 0
    if not any(chosen):
        parser.error(f"no case contains {options.only!r}; --list lists them")
    torch.set_num_threads(1)  # the cases are small
    census = taken(*chosen, seed=options.seed, torch_only=options.torch_only)
    if options.markdown:
        print_markdown(census)
    else:
        print_tables(console, census, each=options.each)
    if options.messages:
        print_messages(console, census)
    return 0 if options.torch_only or census.holds else 1


def print_messages(console: Console, census: Census) -> None:
    """What was said about each case, word for word."""
    for case, verdict in (*census.misuses.items(), *census.correct_uses.items()):
        said = [f"torch [{verdict.said}]: {' '.join(message.split())}" for message in verdict.messages]
        said += [f"fallline: {finding}" for finding in census.fallline[case].findings] if census.fallline else []
        if said:
            console.print(f"\n{case.name} ({', '.join(case.codes) or case.group})", style="bold")
            console.print("\n".join(said), highlight=False, markup=False, soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())
