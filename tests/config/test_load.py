"""YAML and command-line words become a Config, or one line of error; every field is read."""

import ast
import dataclasses
import json
import re
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrlhf.config import (
    A2CConfig,
    CheckpointConfig,
    Config,
    DataConfig,
    DecoderConfig,
    EvalConfig,
    LoraConfig,
    MeshConfig,
    ModelConfig,
    OnlineDPOConfig,
    OptimConfig,
    PPOConfig,
    RewardConfig,
    RewardModelConfig,
    RLOOConfig,
    RopeScaling,
    SampleConfig,
    SFTConfig,
    check,
    load,
    load_pipeline,
    locate_config,
    override,
    save,
)
from jaxrlhf.config.load import _named_by, _parsed, build
from jaxrlhf.core.errors import InputError

DECODER = DecoderConfig(8, 4, 1, 2, 1, 2, 8, rope_scaling=RopeScaling(8.0, 1.0, 4.0, 64))


@pytest.fixture
def write(tmp_path):
    def write(text):
        path = tmp_path / "x.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def test_load_fills_in_defaults(write):
    assert load(write("steps: 7")) == Config(steps=7)


def test_load_reads_nested_parts(write):
    text = """
    algorithm: {name: reward_model, centre_coef: 1}
    model: {path: smollm2, lora: {rank: 4, targets: [q, v]}}
    rewards: [{function: sentiment}, {model: runs/rm, weight: 2}]
    sample: {stop: [1, 2]}
    optim: {learning_rate: 1e-5}
    """
    config = load(write(text))
    assert config.algorithm == RewardModelConfig(centre_coef=1.0)
    assert config.model.lora == LoraConfig(rank=4, targets=("q", "v"))
    assert config.rewards == (RewardConfig("sentiment"), RewardConfig(model="runs/rm", weight=2.0))
    assert config.sample.stop == (1, 2)
    assert config.optim.learning_rate == 0.00001


def test_load_none(write):
    config = load(write("algorithm: {name: ppo, dual_clip: null}\nmodel: {lora: null}"))
    assert config.algorithm == PPOConfig()
    assert config.model.lora is None


def test_load_floats_are_floats(write):
    weight = load(write("rewards: [{function: f, weight: 2}]")).rewards[0].weight
    assert isinstance(weight, float)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("optim: {learning_rte: 1}", ": optim.learning_rte: unknown key (did you mean learning_"),
        ("optim: {learning-rate: 1}", ": optim.learning-rate: unknown key (did you mean learning_"),
        (
            "mesh: {zzz: 1}",
            ": mesh.zzz: unknown key (known: data, fsdp, tensor, context, slices, expert)",
        ),
        (
            "rewards: [{}, {functon: f}]",
            ": rewards.1.functon: unknown key (did you mean function?)",
        ),
        ("model: {lora: {rnk: 1}}", ": model.lora.rnk: unknown key (did you mean rank?)"),
        (
            "algorithm: {name: sft, gamma: 1}",
            ": algorithm.gamma: unknown key (known: name, train_on)",
        ),
        (
            "algorithm: {name: pppo}",
            ": algorithm.name='pppo': unknown (choose one of ppo, a2c, reinforce,",
        ),
        ("algorithm: {gamma: 1}", ": algorithm.name: missing (choose one of ppo,"),
        ("model: {decoder: {vocab: 3}}", ": model.decoder.embed: missing, and it has no default"),
        ("optim: {learning_rate: fast}", ": optim.learning_rate='fast': should be a valid number"),
        ("optim: {learning_rate: .nan}", ": optim.learning_rate=nan: should be a finite number"),
        ("steps: 1.5", ": steps=1.5: should be a valid integer"),
        ("steps: true", ": steps=True: should be a number, not true or false"),
        ("model: {dtype: half}", ": model.dtype='half': should be 'float32' or 'bfloat16'"),
        ("sample: {stop: [1, x]}", ": sample.stop.1='x': should be a valid integer"),
        ("rewards: {function: f}", ": rewards={'function': 'f'}: should be a list"),
        ("optim: 3", ": optim=3: should be keys with values"),
        ("optim:", ": optim=None: should be keys with values"),
        ("[1]", ": should be keys with values"),
        ("", ": the file is empty"),
        ("steps: 1\noptim: [", ":2: not YAML: "),
        ("steps: 1\nsteps: 2", ":2: not YAML: the key steps stands here a second time"),
        ("? [a]\n: 1", ":1: not YAML: found unhashable key"),
        ("output: \x01", ": not YAML: "),
    ],
)
def test_load_error(write, text, message):
    path = write(text)
    with pytest.raises(InputError) as error:
        load(path)
    assert str(error.value).startswith(f"{path}{message}")
    assert "\n" not in str(error.value)


def test_load_missing_file(tmp_path):
    with pytest.raises(InputError, match=r"nope\.yaml: No such file or directory"):
        load(tmp_path / "nope.yaml")


@pytest.mark.parametrize(
    "words",
    [
        ["--optim.learning-rate", "1e-4", "--data.packing", "--algorithm.no-whiten-advantages"],
        ["--optim.learning_rate=1e-4", "data.packing=true", "algorithm.whiten_advantages=False"],
    ],
)
def test_override_flags_and_assignments(words):
    changed = override(Config(), words)
    assert changed == Config(
        optim=OptimConfig(learning_rate=1e-4),
        data=DataConfig(packing=True),
        algorithm=PPOConfig(whiten_advantages=False),
    )


def test_override_lists_and_parts_that_are_there():
    config = Config(
        rewards=(RewardConfig("f"), RewardConfig("g")),
        model=ModelConfig(decoder=DECODER, lora=LoraConfig()),
    )
    words = ["--rewards.1.weight", "2", "--sample.stop", "3", "4", "--model.lora.rank", "8"]
    changed = override(config, [*words, "mesh.tensor=-1", "algorithm.dual_clip=3"])
    assert changed.rewards == (RewardConfig("f"), RewardConfig("g", weight=2.0))
    assert changed.sample.stop == (3, 4)
    assert changed.model == ModelConfig(decoder=DECODER, lora=LoraConfig(rank=8))
    assert changed.mesh.tensor == -1
    assert changed.algorithm == PPOConfig(dual_clip=3.0)


def test_override_last_of_two_counts():
    assert override(Config(), ["steps=3", "--steps", "4"]).steps == 4


def test_override_keeps_the_algorithm_of_the_file(write):
    path = write("algorithm: {name: sft}")
    assert load(path, ["--steps", "3"]) == Config(algorithm=SFTConfig(), steps=3)


def test_override_values_are_no_assignments():
    assert override(Config(), ["--output", "a=b"]).output == "a=b"


def test_override_not_finite():
    with pytest.raises(InputError, match=r"command line: optim\.learning_rate=.nan.: should be"):
        override(Config(), ["--optim.learning-rate", "nan"])


@pytest.mark.parametrize(
    "words", [["--optim.learning-rte", "1"], ["--algorithm.name", "sft"], ["optm.warmup=3"], ["x"]]
)
def test_override_refuses_unknown_words(words, capsys):
    with pytest.raises(SystemExit) as stop:
        override(Config(), words)
    assert stop.value.code == 2
    assert words[0] in capsys.readouterr().err


def at(config, key):
    for part in key.split("."):
        config = config[int(part)] if part.isdecimal() else getattr(config, part)
    return config


@pytest.mark.parametrize(
    ("words", "value"),
    [
        (["algorithm.value_clip=null"], None),
        (["algorithm.value_clip=None"], None),
        (["--algorithm.value-clip", "null"], None),
        (["--algorithm.value-clip=None"], None),
        (["sample.stop=[1, 2]"], (1, 2)),
        (["sample.stop=1"], (1,)),
        (["sample.stop=[]"], ()),
        (["--sample.stop", "[1,2]"], (1, 2)),
        (["--sample.stop", "1", "2", "steps=3"], (1, 2)),
        (["--sample.stop"], ()),
        (["model.lora.targets=[q, v]"], ("q", "v")),
        (["--model.lora.targets", "q", "v"], ("q", "v")),
        (["model.lora.targets=[q]", "--model.lora.targets", "[v]"], ("v",)),
        (["rewards.0.ensemble=[a,b]"], ("a", "b")),
        (["--rewards.0.ensemble", "[a,b]"], ("a", "b")),
        (["model.lora=null"], None),
        (["data.packing=yes"], True),
        (["--data.packing=false"], False),
        (["output=[1, null]"], "[1, null]"),
        (["output=null"], "null"),
        (["--output", "steps=3"], "steps=3"),
        (["--output", "1e3"], "1e3"),
        (["--process", "2"], 2),
    ],
)
def test_override_reads_values_as_the_file_does(words, value):
    config = Config(rewards=(RewardConfig(model="m"),), model=ModelConfig(lora=LoraConfig()))
    key = words[0].removeprefix("--").partition("=")[0].replace("-", "_")
    key = {"process": "distributed.process"}.get(key, key)
    assert at(override(config, words), key) == value


def leaves(config, key=""):
    """Every field that is no part, by its dotted key, and its value."""
    for field in dataclasses.fields(config):
        value, name = getattr(config, field.name), f"{key}{field.name}"
        parts = value if isinstance(value, tuple) else (value,)
        if not any(map(dataclasses.is_dataclass, parts)):
            yield name, value
        elif isinstance(value, tuple):
            for i, part in enumerate(value):
                yield from leaves(part, f"{name}.{i}.")
        else:
            yield from leaves(value, f"{name}.")


def test_override_takes_every_field_as_the_saved_file_writes_it():
    written = [(key, value) for key, value in leaves(FULL) if key != "algorithm.name"]
    assert len(written) > 100
    for key, value in written:
        plain = list(value) if isinstance(value, tuple) else value
        text = value if isinstance(value, str) else json.dumps(plain)
        for words in ([f"{key}={text}"], [f"--{key.replace('_', '-')}={text}"]):
            assert override(FULL, words) == FULL, words


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("sample.stop=[1,x]", "sample.stop.1='x': should be a valid integer"),
        ("sample.stop=[1,", "sample.stop='[1,': not YAML (expected the node content"),
        ("sample.stop={a: 1}", "sample.stop.0={'a': 1}: should be a valid integer"),
        ("model.lora.targets=[1]", "model.lora.targets.0=1: should be 'q', 'k', 'v'"),
        ("optim.learning_rate=null", "optim.learning_rate=None: should be a valid number"),
        ("--optim.learning-rate=fast", "optim.learning_rate='fast': should be a valid number"),
        ("algorithm.value_clip=x", "algorithm.value_clip='x': should be a valid number"),
        ("optim.schedule=step", "optim.schedule='step': should be 'constant', 'linear' or"),
        ("data.packing=null", "data.packing=None: should be a valid boolean"),
        ("steps=true", "steps=True: should be a number, not true or false"),
        ("model.lora=8", "model.lora='8': a whole part: give its fields one by one, or in the"),
        ("rewards=[]", "rewards='[]': a whole part: give its fields"),
        ("optim=null", "optim='null': a whole part: give its fields"),
    ],
)
def test_override_names_key_value_and_remedy(word, message):
    config = Config(rewards=(RewardConfig("f"),), model=ModelConfig(lora=LoraConfig()))
    with pytest.raises(InputError) as error:
        override(config, [word])
    assert str(error.value).startswith(f"command line: {message}")
    assert "\n" not in str(error.value)


def test_override_reads_mappings():
    @dataclasses.dataclass
    class Part:
        options: dict[str, object] = dataclasses.field(default_factory=dict)

    word = "options={thinking: false, depth: {most: 2}}"
    field = _named_by(Part(), word)
    assert build(Part, {"options": _parsed(field, [field.value])}, "command line") == Part(
        {"thinking": False, "depth": {"most": 2}}
    )
    with pytest.raises(InputError, match=r"options='x': should be a valid dictionary"):
        build(Part, {"options": _parsed(field, ["x"])}, "command line")


@pytest.mark.parametrize("words", [["--steps"], ["--steps", "3", "4"]])
def test_override_refuses_a_value_too_few_or_too_many(words, capsys):
    with pytest.raises(SystemExit) as stop:
        override(Config(), words)
    assert stop.value.code == 2
    assert words[-1] in capsys.readouterr().err


def test_override_help_says_how_values_are_written(capsys):
    with pytest.raises(SystemExit) as stop:
        override(Config(), ["--help"])
    assert stop.value.code == 0
    assert "null, [1, 2], {a: 1}" in " ".join(capsys.readouterr().out.split())


FULL = Config(
    algorithm=PPOConfig(dual_clip=3.0),
    model=ModelConfig(decoder=DECODER, tokenizer="words:a b", lora=LoraConfig(targets=("q",))),
    rewards=(RewardConfig("f"), RewardConfig(model="m", weight=-1e-7)),
    sample=SampleConfig(stop=(1, 2)),
    optim=OptimConfig(learning_rate=1e-5, eps=1e-30),
    checkpoint=CheckpointConfig(every=0),
    eval=EvalConfig(gold=(RewardConfig("g"),)),
    output="λ: #1\n\x85yes",
)


@pytest.mark.parametrize("config", [Config(), Config(algorithm=SFTConfig()), FULL])
def test_save_round_trip(config, tmp_path):
    save(config, tmp_path / "config.yaml")
    assert load(tmp_path / "config.yaml") == config


@settings(deadline=None)
@given(st.text(st.characters(codec="utf-8")), st.floats(allow_nan=False, allow_infinity=False))
def test_save_round_trip_any_text_and_number(tmp_path_factory, text, number):
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    config = Config(output=text, rewards=(RewardConfig(text, weight=number),))
    save(config, path)
    assert load(path) == config


def test_save_writes_every_field(tmp_path):
    save(Config(), tmp_path / "config.yaml")
    text = (tmp_path / "config.yaml").read_text()
    assert all(f"{field.name}:" in text for field in dataclasses.fields(PPOConfig))


PACKAGE = Path(__file__).parents[2] / "jaxrlhf"


def sections(kind):
    """The dataclasses that a type is made of, itself included."""
    if dataclasses.is_dataclass(kind):
        yield kind
        for hint in get_type_hints(kind).values():
            yield from sections(hint)
    for part in get_args(kind):
        yield from sections(part)


def attributes_read():
    """Names of all attributes that are read outside the config package itself."""
    for path in PACKAGE.rglob("*.py"):
        if path.parent.name != "config":
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                    yield node.attr


READ = frozenset(attributes_read())
READ_WHOLE = {MeshConfig}
"""make_mesh reads all of its fields at once, by asdict."""

SECTIONS = sorted(set(sections(Config)) - READ_WHOLE, key=lambda kind: kind.__name__)


@pytest.mark.parametrize("section", SECTIONS, ids=lambda kind: kind.__name__)
def test_every_field_is_read(section):
    unread = {field.name for field in dataclasses.fields(section)} - READ
    assert not unread, f"{section.__name__}: no module of jaxrlhf reads {sorted(unread)}"


def test_sections_reach_the_nested_ones():
    names = {kind.__name__ for kind in SECTIONS}
    assert {"Config", "PPOConfig", "SFTConfig", "RopeScaling", "LoraConfig"} <= names


@pytest.mark.parametrize(
    "algorithm",
    [
        "{name: rloo, epochs: 2}",
        "{name: a2c, minibatches: 2}",
        "{name: rloo, target_kl: 0.1}",
        "{name: online_dpo, mask_truncated: true}",
        "{name: online_dpo, aggregation: sequence}",
    ],
)
def test_load_refuses_what_an_algorithm_does_not_read(algorithm, tmp_path):
    name, field = re.findall(r"\w+", algorithm)[1:3]
    path = tmp_path / "run.yaml"
    path.write_text(f"algorithm: {algorithm}")
    with pytest.raises(InputError, match=rf"algorithm.{field}=.*: {name} does not read it: leave"):
        load(path)


def test_load_passes_what_older_versions_wrote_of_settings_that_are_not_read(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("algorithm: {name: a2c, epochs: 1, minibatches: 1, target_kl: null, lam: 0.5}")
    assert load(path).algorithm == A2CConfig(lam=0.5)
    path.write_text("algorithm: {name: online_dpo, kl_in: reward, length: null, off_policy_cap: 2}")
    assert load(path).algorithm == OnlineDPOConfig()
    path.write_text("algorithm: {name: sft, beta: 0.1}")  # another algorithm's, and no constant
    with pytest.raises(InputError, match=r"algorithm\.beta: unknown key"):
        load(path)


@pytest.mark.parametrize("words", [["--algorithm.epochs", "2"], ["algorithm.target_kl=0.1"]])
def test_override_refuses_what_an_algorithm_does_not_read(words):
    with pytest.raises(InputError, match=r"command line: algorithm\.\w+: rloo does not read it"):
        override(Config(algorithm=RLOOConfig()), words)


KWARGS = {"enable_thinking": False, "documents": [{"title": "a", "day": "2026-01-02"}], "n": 1}


def test_a_mapping_and_a_day_are_the_same_in_yaml_on_the_command_line_and_back(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(
        "algorithm: {name: sft}\ndata: {date: 2026-01-02, template_kwargs: "
        "{enable_thinking: false, documents: [{title: a, day: 2026-01-02}], n: 1}}"
    )
    config = load(path)
    assert config.data == DataConfig(date="2026-01-02", template_kwargs=KWARGS)
    for words in (
        ["--data.template-kwargs", "{enable_thinking: true, day: 2026-01-03}"],
        ["data.template_kwargs={enable_thinking: true, day: 2026-01-03}"],
    ):
        changed = override(config, words).data
        assert changed.template_kwargs == {"enable_thinking": True, "day": "2026-01-03"}
        assert changed.date == "2026-01-02"
    assert override(config, ["--steps", "3"]).data == config.data
    save(config, path)
    assert load(path) == config
    hash(config)


@pytest.mark.parametrize("words", ["{a", "3", "[1]"])
def test_what_is_no_mapping_is_refused(words):
    with pytest.raises((InputError, SystemExit)):
        override(Config(), ["--data.template-kwargs", words])


def test_load_a_config_of_the_package(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = load("jaxrlhf:configs/grpo_smollm2.yaml", ["--steps", "3"])
    assert (config.algorithm.name, config.steps) == ("grpo", 3)
    assert load_pipeline("jaxrlhf:configs/pipelines/demo_tiny.yaml").stages[0].name == "corpus"
    assert locate_config("mine.yaml") == Path("mine.yaml")
    with pytest.raises(
        InputError, match=r"no such config in the package \(did you mean .*grpo_smo"
    ):
        load("jaxrlhf:configs/grpo_smollm.yaml")
    with pytest.raises(InputError, match=r"no such config in the package"):
        load("jaxrlhf:configs/../pyproject.toml")


@pytest.mark.parametrize(
    ("words", "field"),
    [
        (["output=nope://b/run"], "output"),
        (["model.path=nope://b/m"], "model.path"),
        (["data.train=nope://b/x.jsonl"], "data.train"),
        (["data.eval=nope://h/x.jsonl"], "data.eval"),
        (["rewards.0.model=nope://b/rm", "rewards.0.function="], "rewards.0.model"),
    ],
)
def test_check_refuses_urls_that_nothing_reads(words, field):
    check(load("jaxrlhf:configs/grpo_smollm2.yaml", ["data.train=memory://b/x.jsonl"]))
    with pytest.raises(InputError, match=rf"^{field}=\w+://\S+: nothing reads \w+://"):
        check(load("jaxrlhf:configs/grpo_smollm2.yaml", words))
    with pytest.raises(InputError, match=r"^output=nope://b: nothing reads \w+://"):
        load_pipeline("jaxrlhf:configs/pipelines/demo_tiny.yaml", "nope://b")
