"""What a run says at its end, and the command that it names."""

from dataclasses import replace

import pytest

from jaxrlhf.config import Config, DataConfig, ModelConfig, RewardModelConfig, SFTConfig
from jaxrlhf.run.notices import ending

POLICY = Config(output="runs/a b", data=DataConfig(eval="held_out.jsonl"))


@pytest.mark.parametrize(
    ("config", "chats", "command"),
    [
        (POLICY, True, "jaxrlhf eval 'runs/a b', or jaxrlhf chat 'runs/a b'"),
        (replace(POLICY, data=DataConfig()), True, "jaxrlhf chat 'runs/a b'"),
        (
            replace(POLICY, algorithm=SFTConfig()),
            False,
            "jaxrlhf generate 'runs/a b' --raw --prompt TEXT",
        ),
        (
            Config(algorithm=RewardModelConfig(), model=ModelConfig(path="m"), output="r"),
            True,
            "jaxrlhf generate m --prompt TEXT --n 8 --keep best --reward-model r",
        ),
    ],
)
def test_ending_names_page_and_next_command(config, chats, command):
    lines = ending(config, {}, chats)
    assert lines == [f"report: {config.output}/report.html", f"next: {command}"]


def test_ending_begins_with_the_gold_measure():
    summary = {"gold_before": 0.2, "gold_after": 0.77, "gold_rise": 0.57, "gold_rise_ci": 0.1}
    assert ending(POLICY, summary, True)[0] == "gold measure 0.20 → 0.77 (rise 0.57 ± 0.10)"
