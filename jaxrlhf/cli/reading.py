"""The commands that read what runs have written: report, diagnose."""

from typing import Annotated

from tyro.conf import Positional, arg


def report(
    runs: Annotated[Positional[tuple[str, ...]], arg(metavar="RUN…")],
    output: str = "",
) -> None:
    """Write one page about a run, or about several side by side, that needs no network to be read.

    Args:
      runs: output folders of runs.
      output: the .html file; report.html in the folder of a single run, if empty.
    """
    from jaxrlhf.report import write_report

    print(write_report(runs, output))


def diagnose(
    run: Annotated[Positional[str], arg(metavar="RUN")], json: bool = False, strict: bool = False
) -> None:
    """Say what is wrong with a run, finished or not, by what it has written down.

    Prints each finding with its evidence and remedy, and writes them to RUN/diagnosis.json.

    Args:
      run: the output folder of a run.
      json: print the contents of diagnosis.json instead.
      strict: exit with status 1 if there is a problem; warnings are none.
    """
    from jaxrlhf.diagnosis import examine, read_history
    from jaxrlhf.diagnosis.show import save, show, to_json

    history = read_history(run)
    findings = examine(history)
    if json:
        print(to_json(history, findings))
    else:
        show(run, history, findings)
    save(run, history, findings)
    if strict and any(finding.severity == "problem" for finding in findings):
        raise SystemExit(1)
