"""What docs/from_trl.md says: its configs load and pass the rules between fields, and the fields
that its table names are there."""

import re
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import get_args, get_type_hints

import pytest

from jaxrlhf.config import AlgorithmConfig, Config, check, load

TEXT = (Path(__file__).parents[1] / "docs/from_trl.md").read_text(encoding="utf-8")
CONFIGS = re.findall(r"```yaml\n(.*?)```", TEXT, re.S)


def test_there_is_a_config_of_each():
    named = re.findall(r"^algorithm: \{name: (\w+)", "\n".join(CONFIGS), re.M)
    assert named == ["ppo", "rloo", "grpo", "dpo", "kto", "reward_model"]


@pytest.mark.parametrize("text", CONFIGS, ids=lambda text: text[17:24])
def test_config_can_be_started(text, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(text, encoding="utf-8")
    check(load(path))


def test_fields_of_the_table_are_there():
    known = {f.name for kind in get_args(AlgorithmConfig) for f in fields(kind)}
    table = re.search(r"^## Names\n(.*?)^## ", TEXT, re.M | re.S)[1]
    ours = [row.split(" | ")[1] for row in table.splitlines() if row.count(" | ") == 1]
    named = [x for row in ours for x in re.findall(r"`(\w+)\.(\w+)[`:]", row)]
    assert len(named) > 25
    hints = get_type_hints(Config)
    for section, name in named:
        kinds = [x for x in (*get_args(hints[section]), hints[section]) if is_dataclass(x)]
        there = known if section == "algorithm" else {f.name for x in kinds for f in fields(x)}
        assert name in there, f"{section}.{name}"
