"""Configs that ``init`` writes: of every algorithm one that loads and can be started. One on rows
and a function of the user's own is trained in test_first_hour."""

import re
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import pytest
import runs

from jaxrlhf.apps import init
from jaxrlhf.config import check, is_on_policy, load
from jaxrlhf.config.load import build, parse_yaml
from jaxrlhf.config.run import Config
from jaxrlhf.core.errors import InputError
from jaxrlhf.data.tokens import load_data
from jaxrlhf.models.gguf import read_gguf_decoder, smollm2_path
from jaxrlhf.models.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def smollm2():
    """Read once for all algorithms."""
    read = lru_cache(load_tokenizer)
    decoder = read_gguf_decoder(smollm2_path())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(init, "load_tokenizer", read)
        patch.setattr(init, "read_decoder", lambda path: decoder)
        yield read("smollm2"), decoder


@pytest.mark.parametrize("name", init.NAMES)
def test_init_writes_a_config_that_can_be_started(name, smollm2, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tokenizer, decoder = smollm2
    assert init.write_config(name, "", "", "smollm2", "") == (
        f"{name}.yaml: written; next: jaxrlhf train {name}.yaml"
    )
    config = load(f"{name}.yaml")
    check(config)
    assert config.algorithm.name == name
    assert config.output == f"runs/{name}"
    rows = load_data(config, config.data.train, tokenizer, decoder.vocab)  # none is too long
    assert len(rows) >= 8
    assert bool(config.rewards) == (is_on_policy(config) and name != "gkd")
    text = Path(f"{name}.yaml").read_text(encoding="utf-8")
    assert f"jaxrlhf train {name}.yaml" in text
    # Each line that is no section is explained, but for what the algorithm's own config sets.
    said = [line for line in text.splitlines() if re.match(r"\s*(train|path|steps|output):", line)]
    assert all("#" in line for line in said)
    assert len(said) == 4 + (name == "gkd")  # its teacher's path


def test_text_of_loads_to_the_config(tmp_path):
    config = runs.of("ppo", tmp_path)
    model = replace(config.model, path="a # b", decoder=None, tokenizer="")
    config = replace(config, model=model)
    found = build(Config, parse_yaml(init.text_of(config, "x.yaml", 24)), "x.yaml")
    kept = ("algorithm", "model", "data", "steps", "output")
    assert [getattr(found, name) for name in kept] == [getattr(config, name) for name in kept]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"algorithm": "grppo"}, r"grppo: unknown algorithm \(did you mean grpo\?\)"),
        ({"reward": "mine:f"}, "--reward mine:f: dpo learns from its data alone"),
        ({"algorithm": "gkd", "reward": "mine:f"}, "gkd learns from its teacher alone"),
        ({"data": "none.jsonl"}, "none.jsonl: no such file"),
        ({"data": "nope://b/x.jsonl"}, "data.train=nope://b/x.jsonl: nothing reads nope"),
        ({"path": "there.yaml"}, "there.yaml: is there already: give another file with -o"),
        ({"algorithm": "grpo", "reward": "mine"}, "reward function 'mine' is unknown"),
        (
            {"algorithm": "grpo", "reward": "own_r:f"},
            "'own_r:f' asks for 'solution', and there are",
        ),
    ],
)
def test_init_refuses(given, message, smollm2, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    Path("there.yaml").write_text("steps: 1\n")
    Path("own_r.py").write_text("def f(completions, solution): return [1.0] * len(completions)\n")
    wish = {"algorithm": "dpo", "data": "", "reward": "", "model": "smollm2", "path": "new.yaml"}
    with pytest.raises(InputError, match=message):
        init.write_config(**{**wish, **given})
    assert not Path("new.yaml").exists()
    assert Path("there.yaml").read_text() == "steps: 1\n"
