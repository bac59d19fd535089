"""``jaxrlhf report``: one page about a run, or several compared, that needs no network."""

from collections.abc import Sequence
from pathlib import Path

import jinja2

from jaxrlhf.core.errors import InputError
from jaxrlhf.core.files import check_file, write_atomic, writing
from jaxrlhf.run.report.compared import compare
from jaxrlhf.run.report.page import Page
from jaxrlhf.run.report.reading import RunFiles, read_run
from jaxrlhf.run.report.single import describe

TEMPLATE = Path(__file__).with_name("page.html")


def write_report(folders: Sequence[str | Path], output: str | Path = "") -> str:
    """Write the page that the files of one run, or of several, make.

    Args:
      folders: output folders of runs.
      output: the .html file; report.html in the folder of a single run, if empty.

    Returns:
      The path of the page.

    Raises:
      InputError: a folder that is no run's, a file that cannot be read, no output for several, or
        one that cannot be written.
    """
    if not folders:
        raise InputError("report: RUN: missing: give the output folder of at least one run")
    if len(folders) > 1 and not output:
        raise InputError("output: missing: give an .html file for the page about several runs")
    runs = [read_run(folder) for folder in folders]
    path = Path(output) if output else Path(folders[0]) / "report.html"
    check_file(path)
    with writing(path):
        write_atomic(path, render(runs))
    return str(path)


def render(runs: Sequence[RunFiles]) -> str:
    """The page as HTML: a pure function of what the runs have written, all of it escaped."""
    page: Page = describe(runs[0]) if len(runs) == 1 else compare(runs)
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(page=page)
