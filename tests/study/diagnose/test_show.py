"""What is printed and written of findings."""

import json

import histories
import pytest

from jaxrlhf.core.errors import InputError
from jaxrlhf.study.diagnose import examine
from jaxrlhf.study.diagnose.show import lines, save, show, to_json

ILL = histories.ILL["kl_negative"]


def test_to_json_has_the_step_and_four_fields():
    found = json.loads(to_json(ILL, examine(ILL)))
    assert found["step"] == histories.STEPS
    (row,) = found["findings"]
    assert list(row) == ["name", "severity", "evidence", "remedy"]
    assert (row["name"], row["severity"]) == ("kl_negative", "problem")


def test_save_writes_diagnosis(tmp_path):
    save(tmp_path, ILL, examine(ILL))
    found = json.loads((tmp_path / "diagnosis.json").read_text())
    assert found["findings"][0]["name"] == "kl_negative"


def test_save_no_folder(tmp_path):
    with pytest.raises(InputError, match=r"diagnosis\.json: No such file or directory: copy"):
        save(tmp_path / "no", ILL, [])


def test_show_is_plain_where_nobody_looks(capsys):
    show("runs/x", ILL, examine(ILL))
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert out.splitlines()[:3] == [
        "runs/x: ppo, 40 of 100 iterations, 3 evaluations",
        "",
        "PROBLEM  kl_negative",
    ]


def test_lines_say_what_was_not_looked_at():
    texts = [text for text, _ in lines("x", histories.HEALTHY["ppo"], [])]
    assert texts[1:] == ["nothing found"]
    bare = histories.policy()
    del bare.evaluation.values["gold"]
    texts = [text for text, _ in lines("x", bare, [])]
    assert texts[1:] == [
        "nothing found",
        "not looked at: gold against proxy (there is no eval.gold)",
    ]
    texts = [text for text, _ in lines("x", histories.HEALTHY["dpo"], [])]
    assert texts[1:] == ["nothing found"]
