"""What the doctor found: one finding a line, a table, an exit code.

report = Report({"model": "..."})
report.add(Finding("weights after perturbed", "equal", "equal bits", OK))
print(report.table()); sys.exit(report.exit_code)
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

# info: measured, with nothing to hold it against
OK, INFO, WARN, FAIL = "ok", "info", "warn", "FAIL"


@dataclass(frozen=True)
class Finding:
    """One measurement. advice: one sentence, shown below the table where the verdict is warn or FAIL."""

    name: str
    measured: str
    expected: str
    verdict: str
    advice: str = ""


@dataclass
class Report:
    """facts: what was examined, in the table's head.

    completed: no check raised, so that all ranks are at the same place.
    """

    facts: dict[str, str] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    completed: bool = True

    def add(self, finding: Finding) -> None:
        """Put a finding at the end."""
        self.findings.append(finding)

    def count(self, verdict: str) -> int:
        """How many findings have the verdict."""
        return sum(finding.verdict == verdict for finding in self.findings)

    @property
    def exit_code(self) -> int:
        """0 where nothing failed, else 1."""
        return int(self.count(FAIL) > 0 or not self.findings)

    def table(self) -> str:
        """Aligned plain text: facts, findings, advice, a last line with the verdict."""
        label = max((len(name) for name in self.facts), default=0)
        lines = [*(f"{name:<{label}}  {value}" for name, value in self.facts.items()), ""]
        rows = [("check", "measured", "expected", "verdict")]
        rows += [
            (found.name, found.measured, found.expected, found.verdict) for found in self.findings
        ]
        widths = [max(len(row[column]) for row in rows) for column in range(3)]
        lines += [
            "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=False))
            + f"  {row[3]}"
            for row in rows
        ]
        noted = [found for found in self.findings if found.verdict in (WARN, FAIL) and found.advice]
        lines += ["", *(f"{found.verdict}: {found.name}: {found.advice}" for found in noted)]
        if self.count(WARN) and "bfloat16" in self.facts.get("model", ""):
            lines.append(
                "A warn is no failure. In bfloat16 it may be rounding: with --model.dtype float32 what is "
                "rounding goes, and a fault stays."
            )
        counts = ", ".join(f"{self.count(verdict)} {verdict}" for verdict in (OK, WARN, FAIL))
        return "\n".join([*lines, f"{'FAIL' if self.exit_code else 'ok'}: {counts}"])

    def as_json(self) -> dict[str, Any]:
        """Facts, findings and exit code, for a JSON file."""
        return {
            "facts": self.facts,
            "findings": [asdict(finding) for finding in self.findings],
            "exit_code": self.exit_code,
        }


def graded(error: float, ok: float, fail: float) -> str:
    """Verdict on an error >= 0: ok up to `ok`, FAIL above `fail` (and for NaN), warn between."""
    return OK if error <= ok else WARN if error <= fail else FAIL


def passed(condition: bool) -> str:
    """The verdict OK where the condition holds, else FAIL."""
    return OK if condition else FAIL
