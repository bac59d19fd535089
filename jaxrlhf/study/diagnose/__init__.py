"""What is wrong with a run, read from what it has written down; findings shown and saved."""

import json
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.text import Text

from jaxrlhf.core.files import write_atomic
from jaxrlhf.core.shown import visible
from jaxrlhf.study.diagnose import hacking, policy, signal, supervised
from jaxrlhf.study.diagnose.history import Detector, Finding, History, read_history

DETECTORS: dict[str, Detector] = {
    name: found
    for module in (hacking, policy, signal, supervised)
    for name, found in vars(module).items()
    if isinstance(found, Detector)
}
"""Every detector, by the name of what it finds; findings of one severity stand in this order."""

STYLES = {"problem": "bold red", "warning": "bold yellow"}


def diagnose(folder: str | Path) -> list[Finding]:
    """What all detectors find in a run's folder, problems first.

    Args:
      folder: the output folder of a run, finished or not.

    Raises:
      InputError: not the folder of a run, nothing recorded yet, a line that is no record.
    """
    return examine(read_history(folder))


def examine(history: History) -> list[Finding]:
    """What all detectors find in a history, problems first."""
    found = [finding for detect in DETECTORS.values() if (finding := detect(history))]
    return sorted(found, key=lambda finding: finding.severity != "problem")


def to_json(history: History, findings: list[Finding]) -> str:
    """``step``, iterations that the run had done, and ``findings``, a list of objects with name,
    severity, evidence and remedy."""
    listed = [asdict(finding) for finding in findings]
    return json.dumps({"step": _done(history), "findings": listed}, indent=2)


def save(folder: str | Path, history: History, findings: list[Finding]) -> None:
    """Write diagnosis.json into a run's folder.

    Raises:
      InputError: nothing can be written there.
    """
    write_atomic(Path(folder) / "diagnosis.json", to_json(history, findings) + "\n")


def lines(folder: str | Path, history: History, findings: list[Finding]) -> list[tuple[str, str]]:
    """What to print: (text, style) a line."""
    done, steps = _done(history), history.config.steps
    count, name = len(history.evaluation.step_I), history.config.algorithm.name
    out = [(f"{folder}: {name}, {done} of {steps} iterations, {count} evaluations", "bold")]
    for finding in findings:
        out.append(("", ""))
        out.append((f"{finding.severity.upper()}  {finding.name}", STYLES[finding.severity]))
        out.append((f"  evidence: {finding.evidence}", ""))
        out.append((f"  remedy:   {finding.remedy}", ""))
    if not findings:
        out.append(("nothing found", "bold green"))
    if "score" in history.training.values and "gold" not in history.evaluation.values:
        out.append(("not looked at: gold against proxy (there is no eval.gold)", "dim"))
    return out


def _done(history: History) -> int:
    return int(history.training.step_I[-1])


def show(folder: str | Path, history: History, findings: list[Finding]) -> None:
    """Print them, in colour on a terminal, as plain lines elsewhere."""
    console = Console()
    for text, style in lines(folder, history, findings):
        # a terminal that is not UTF-8 gets "?" for "→", where print would raise
        readable = visible(text).encode(console.encoding, "replace").decode(console.encoding)
        console.print(Text(readable, style), soft_wrap=True)
