"""What ``altopt check-data`` prints: findings by kind, the first few of each, and a line for each split."""

from altopt.datasets.checking import Finding
from stages.pipeline.checking import DataCheck

SHOWN = 3  # of one kind; --json has all


def check_lines(check: DataCheck) -> str:
    """Return a check as lines of text."""
    problems = [each for each in check.findings if each.severity == "problem"]
    warnings = [each for each in check.findings if each.severity == "warning"]
    lines = [check.words, *_grouped("problem", problems), *_grouped("warning", warnings)]
    lines += [f"{split}: {look.line()}" for split, look in check.looks.items()]
    # What a file says must not reach the terminal as a command to it.
    return "\n".join("".join(char if char.isprintable() else ascii(char)[1:-1] for char in line) for line in lines)


def _grouped(severity: str, findings: list[Finding]) -> list[str]:
    lines = [f"{len(findings) or 'no'} {severity}{'s'[: len(findings) != 1]}"]
    for kind in dict.fromkeys(each.kind for each in findings):
        of_kind = [each.text for each in findings if each.kind == kind]
        lines += [f"  {kind} ({len(of_kind)})", *(f"    {text}" for text in of_kind[:SHOWN])]
        if len(of_kind) > SHOWN:
            lines.append(f"    ... and {len(of_kind) - SHOWN} more, which --json lists")
    return lines
