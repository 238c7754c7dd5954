"""The verdicts of the census in tables, for a terminal and for docs/. `verdicts` says how they come about."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from rich.table import Table

from census.case import Case
from census.verdicts import FalllineVerdict, TorchVerdict

TORCH_SAYS = {"reason": "the reason", "no reason": "something else", "nothing": "nothing", "has none": "–"}
ALLOWED_WARNINGS = 0.02


@dataclass(frozen=True)
class Census:
    """The verdicts about every case; those of fallline are empty where only torch was asked."""

    misuses: Mapping[Case, TorchVerdict]
    correct_uses: Mapping[Case, TorchVerdict]
    fallline: Mapping[Case, FalllineVerdict] = field(default_factory=dict)

    @property
    def uncaught(self) -> list[Case]:
        """The misuses that fallline does not catch."""
        return [case for case in self.misuses if self.fallline and not self.fallline[case].catches(case)]

    def flagged(self, severity: str) -> list[Case]:
        """The correct uses of which fallline's worst finding has this severity; errors raised are errors."""
        found = []
        for case in self.correct_uses:
            verdict = self.fallline.get(case, FalllineVerdict())
            if verdict.worst == severity or (verdict.raised and severity == "error"):
                found.append(case)
        return found

    @property
    def disturbed(self) -> list[Case]:
        """The cases in which the check has left something behind."""
        return [case for case, verdict in self.fallline.items() if verdict.disturbed]

    @property
    def holds(self) -> bool:
        """Whether fallline meets what is asked of it."""
        few = len(self.flagged("warning")) <= ALLOWED_WARNINGS * len(self.correct_uses)
        return not self.uncaught and not self.flagged("error") and few and not self.disturbed


Row = Sequence[str | int]


def misuse_rows(census: Census) -> tuple[Row, list[Row]]:
    """For each code: cases, what torch says, how many fallline catches; the head, and the rows with their sum."""
    head = ["code", "misuses", "torch: the reason", "something else", "nothing", "has no such loss"]
    rows = []
    for code, cases in {**_grouped(census.misuses), "all": list(census.misuses)}.items():
        said = [census.misuses[case].said for case in cases]
        row: list[str | int] = [code, len(cases), *(said.count(each) for each in TORCH_SAYS)]  # type: ignore[arg-type]
        if census.fallline:
            row.append(sum(case not in census.uncaught for case in cases))
        rows.append(row)
    return [*head, "fallline catches"] if census.fallline else head, rows


def correct_rows(census: Census) -> tuple[Row, list[Row]]:
    """For each group: cases, how many torch and fallline flag; the head, and the rows with their sum."""
    head = ["correct uses", "cases", "torch flags", "has no such loss"]
    rows = []
    for group, cases in {**_grouped(census.correct_uses), "all": list(census.correct_uses)}.items():
        said = [census.correct_uses[case].said for case in cases]
        row: list[str | int] = [
            group,
            len(cases),
            said.count("no reason") + said.count("reason"),
            said.count("has none"),
        ]
        if census.fallline:
            row += [sum(case in census.flagged(each) for case in cases) for each in ("error", "warning", "note")]
        rows.append(row)
    return [*head, "fallline: errors", "warnings", "notes"] if census.fallline else head, rows


def _grouped(cases: Iterable[Case]) -> dict[str, list[Case]]:
    groups = defaultdict(list)
    for case in cases:
        groups[case.group].append(case)
    return groups


def each_misuse(census: Census) -> tuple[Row, list[Row]]:
    """One row for each misuse."""
    rows = []
    for case, verdict in census.misuses.items():
        rows.append([case.group, case.sentence, TORCH_SAYS[verdict.said], *_found(census, case)])
    return ["code", "misuse", "torch says", *(["fallline finds"] if census.fallline else [])], rows


def each_correct_use(census: Census) -> tuple[Row, list[Row]]:
    """One row for each correct use."""
    rows = []
    for case, verdict in census.correct_uses.items():
        rows.append([case.group, case.sentence, TORCH_SAYS[verdict.said], *_found(census, case)])
    return ["group", "correct use", "torch says", *(["fallline finds"] if census.fallline else [])], rows


def _found(census: Census, case: Case) -> list[str]:
    if not census.fallline:
        return []
    verdict = census.fallline[case]
    if verdict.raised:
        return [f"raised {verdict.raised.partition(':')[0]}"]
    finding = verdict.catches(case) or next(iter(verdict.findings), None)
    return [f"{finding.code} ({finding.severity})" if finding else "nothing"]


def summary(census: Census) -> list[str]:
    """The figures in sentences."""
    misuses, correct = census.misuses, census.correct_uses
    have = [case for case, verdict in misuses.items() if verdict.said != "has none"]
    right = sum(verdict.said == "reason" for verdict in misuses.values())
    else_ = sum(verdict.said == "no reason" for verdict in misuses.values())
    have_correct = sum(verdict.said != "has none" for verdict in correct.values())
    flagged = sum(verdict.said in ("reason", "no reason") for verdict in correct.values())
    lines = [
        f"torch: {right} of {len(have)} misuses of its losses and of callables caught with the right reason "
        f"({right / len(have):.0%}), {else_} with another error or warning; {flagged} of {have_correct} correct uses "
        "flagged."
    ]
    if census.fallline:
        caught, errors, warned = len(misuses) - len(census.uncaught), census.flagged("error"), census.flagged("warning")
        ours = sum(case not in census.uncaught for case in have)
        lines.append(
            f"fallline: {caught} of {len(misuses)} misuses caught with the right code ({caught / len(misuses):.1%}), "
            f"{ours} of those {len(have)}; of {len(correct)} correct uses {len(errors)} flagged as errors, "
            f"{len(warned)} as warnings ({len(warned) / len(correct):.1%}), {len(census.flagged('note'))} with a note."
        )
        seconds = sorted(verdict.seconds for verdict in census.fallline.values())
        lines.append(f"A check takes {1e3 * seconds[len(seconds) // 2]:.1f} ms (median), {seconds[-1]:.2f} s at most.")
    return lines


def failures(census: Census) -> list[str]:
    """A line for each case in which fallline falls short."""
    lines = []
    for case in census.uncaught:
        verdict = census.fallline[case]
        found = "; ".join(f"{each.severity} {each.code}" for each in verdict.findings) or "nothing"
        lines.append(
            f"missed: {case.name} [{', '.join(case.codes)}, at least {case.severity}]: {verdict.raised or found}"
        )
    for severity in ("error", "warning"):
        for case in census.flagged(severity):
            verdict = census.fallline[case]
            found = "; ".join(str(each) for each in verdict.findings if each.severity == severity)
            lines.append(f"false {severity}: {case.name}: {verdict.raised or found}")
    lines += [f"disturbed: {case.name}: {', '.join(census.fallline[case].disturbed)}" for case in census.disturbed]
    return lines


def in_terminal(title: str, head: Row, rows: Iterable[Row]) -> Table:
    """A table of rich's."""
    table = Table(title=title, title_justify="left", show_edge=False, pad_edge=False)
    figures = [isinstance(cell, int) for cell in next(iter(rows), head)]
    for name, is_figure in zip(head, figures, strict=True):
        table.add_column(str(name), justify="right" if is_figure else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(str, row), style="bold" if row[0] == "all" else "")
    return table


def in_markdown(head: Row, rows: Sequence[Row]) -> str:
    """A table of Markdown's."""
    figures = [isinstance(cell, int) for cell in rows[0]]
    lines = [
        "| " + " | ".join(map(str, head)) + " |",
        "| " + " | ".join("--:" if is_figure else "---" for is_figure in figures) + " |",
    ]
    for row in rows:
        cells = [str(cell).replace("|", "\\|") for cell in row]
        if row[0] == "all":
            cells = [f"**{cell}**" for cell in cells]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
