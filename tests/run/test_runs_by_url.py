"""Commands that read what a run has written, given its URL: no weight comes along."""

from pathlib import Path

import pytest
from test_report import write_run

from jaxrlhf.apps.cli import main
from jaxrlhf.run.folder import read_run

URL = "memory://bucket/runs/ppo"


def put_run(store, folder, url=URL, **changes):
    """A run that has been copied to a store, with weights."""
    write_run(folder, **changes)
    for path in filter(Path.is_file, folder.rglob("*")):
        store.pipe_file(f"{url.removeprefix('memory:/')}/{path.name}", path.read_bytes())
    store.pipe_file(f"{url.removeprefix('memory:/')}/checkpoints/4/state/d/weights", b"heavy")


def copies(tmp_path):
    return {path.name for path in (tmp_path / "home").rglob("*") if path.is_file()}


def test_report_and_diagnose_of_a_url_bring_the_small_files(store, tmp_path, capsys):
    put_run(store, tmp_path / "here")
    assert main(["report", URL]) == 0
    said = capsys.readouterr()
    page = Path(said.out.strip())
    assert f"RUN: {URL}: 0.0 MiB in" in said.err
    text = page.read_text(encoding="utf-8")
    assert URL in text
    assert str(page.parent) not in text
    assert page.name == "report.html"
    # Nothing has changed there: nothing is copied again, and what is found stands with the rest.
    assert main(["diagnose", URL]) == 0
    said = capsys.readouterr()
    assert f"{URL}: ppo, 4 of 4 iterations" in said.out
    assert "MiB" not in said.err
    assert (page.parent / "diagnosis.json").is_file()
    assert read_run(URL).diagnosis is not None
    assert "weights" not in copies(tmp_path)
    put_run(store, tmp_path / "other", f"{URL}2")
    assert main(["report", URL, f"{URL}2", "--output", str(tmp_path / "both.html")]) == 0
    assert "ppo2" in (tmp_path / "both.html").read_text(encoding="utf-8")


def test_pipelines_url_stands_for_its_last_run(store, tmp_path):
    """By the numbers of the stages: copies have not the times of the originals."""
    for number, name in enumerate(("sft", "policy"), 1):
        put_run(store, tmp_path / name, f"{URL}/{name}", seed=number)
        store.pipe_file(f"/bucket/runs/ppo/{name}/stage.json", b'{"number": %d}' % number)
    found = read_run(URL)
    assert found.folder == f"{URL}/policy"
    assert [run.config["seed"] for run in (*found.earlier, found)] == [1, 2]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["report", URL, "--watch"], f"RUN={URL}: a URL, and here only a file or folder of this"),
        (["report", f"{URL}/none"], "nothing is there"),
        (["diagnose", "nope://b/run"], "nothing reads nope://"),
    ],
)
def test_urls_that_will_not_do_are_refused_in_a_line(words, message, store, tmp_path, capsys):
    put_run(store, tmp_path / "here")
    assert main(words) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
