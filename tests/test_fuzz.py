"""Whatever the bytes of a file, its reader gives values or an InputError that names it, within two
seconds of processor time and 256 MiB.

Inputs are files that are right, damaged: bytes flipped, cut, moved or overwritten with sizes, and
values of JSON, YAML and GGUF replaced by others. The same 300 a reader each time; `make fuzz` draws
10,000 new ones a reader (ARGS="--inputs 500 -k gguf" for some).
"""

import contextlib
import copy
import gc
import json
import signal
import struct
import time
from pathlib import Path

import gguf
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from memory import forget_peak, occupied
from tiny_models import byte_level, rigged_folder, sentencepiece, unigram

from jaxrlhf.config import DataConfig, load
from jaxrlhf.config.load import dump
from jaxrlhf.config.stages import load_pipeline, stage_run
from jaxrlhf.core.errors import LONGEST, InputError
from jaxrlhf.core.shown import visible
from jaxrlhf.data.chat import Writer, chat_settings
from jaxrlhf.data.formats import READERS as FORMATS
from jaxrlhf.data.formats import read_prompts
from jaxrlhf.data.rows import read_rows
from jaxrlhf.data.tokens import encode_rows
from jaxrlhf.models import gguf as reading
from jaxrlhf.models.ends import _said, read_generation
from jaxrlhf.models.gguf import read_gguf
from jaxrlhf.models.hf import read_hf
from jaxrlhf.models.hf_config import is_reward_model, read_bias, read_config
from jaxrlhf.models.tokenizer import load_tokenizer, token_bytes
from jaxrlhf.run.folder import read_run
from jaxrlhf.run.report import render
from jaxrlhf.study.diagnose import examine, read_history

IN_CI = 300
SECONDS, BYTES = 2.0, 2**28

CHATML = Path(__file__).parent / "data" / "chat_templates" / "chatml.jinja"
CONFIGS = Path(__file__).parents[1] / "configs"


# Damage

ODD = [
    None, True, -1, 0, 1, 2**31 - 1, 2**31, 2_000_000_000, 2**53, 2**64, 10**299, 0.5, -0.0, 1e308,
    -1e308, 5e-324, float("nan"), float("inf"), "", "x", "\0", "\ud800", "\x1b[2J", "a" * 5000,
    "..", "/", "1e5", "{a}", "{{", [], {}, [[]], [5], ["a", 5], {"a": 1}, {"": None}, {"name": "x"},
    {"role": "user", "content": "a"}, [{"role": "user", "content": "a"}],
]  # fmt: skip
WORDS = [
    b"\0", b"\xff", b"\xed\xa0\x80", b"\xef\xbb\xbf", b"\x1b[2J", b"{", b"}", b"[", b"]", b'"',
    b",", b":", b"\\u0000", b"\\ud800", b"null", b"NaN", b"-Infinity", b"1e999", b"9" * 400,
    b"[" * 2000,
    b"&a ", b"*a", b"<<: *a\n", b"- ", b"? ", b"!!int ", b"!!binary ", b"!!python/name:os.system ",
    b"{{", b"}}", b"{% for i in range(9) %}", b"{% endfor %}", b"{% if %}", b"{{ 'x' * 10**9 }}",
    b"{{ messages }}", b"{{ m.x.y }}", b"|tojson", b"**", b"\r\n", b"\n", b"\t",
]  # fmt: skip
SIZES = [
    struct.pack(kind, number)
    for kind, numbers in {
        "<I": (0, 1, 4, 2**31 - 1, 2**32 - 1),
        "<Q": (0, 1, 255, 2**20, 2**31, 2**62, 2**64 - 1),
    }.items()
    for number in numbers
]


def one_of(draw, items):
    """One of ``items``, by its place: hypothesis is slow with many or long ones."""
    return items[draw(st.integers(0, len(items) - 1))]


@st.composite
def damaged(draw, seeds):
    """One of ``seeds``, changed in one to four places."""
    content = one_of(draw, seeds)
    for _ in range(draw(st.integers(1, 4))):
        # Most of what can go wrong stands near the beginning.
        near = one_of(draw, [32, 256, len(content)])
        at = draw(st.integers(0, min(near, len(content))))
        end = min(len(content), at + one_of(draw, [0, 1, 4, 8, 40, 10**6]))
        kind = one_of(draw, ["flip", "size", "word", "cut", "twice", "bytes"])
        if kind == "flip" and at < len(content):
            flipped = content[at] ^ (1 << draw(st.integers(0, 7)))
            content = content[:at] + bytes([flipped]) + content[at + 1 :]
        elif kind == "size":
            size = one_of(draw, SIZES)
            content = content[:at] + size + content[at + len(size) :]
        elif kind == "word":
            content = content[:at] + one_of(draw, WORDS) + content[at:]
        elif kind == "cut":
            content = content[:at] + content[end:]
        elif kind == "twice":
            content = content[:end] + content[at:]
        else:
            content = content[:at] + draw(st.binary(max_size=8)) + content[end:]
    return content


def places(value, path=()):
    """The ways to every value in nested lists and objects."""
    yield path
    if isinstance(value, dict | list):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from places(item, (*path, key))


@st.composite
def changed(draw, values):
    """One of ``values``, of which one to three are replaced, removed or added to."""
    value = copy.deepcopy(one_of(draw, values))
    for _ in range(draw(st.integers(1, 3))):
        path, odd = one_of(draw, list(places(value))), copy.deepcopy(one_of(draw, ODD))
        if not path:
            value = odd if draw(st.integers(0, 20)) == 0 else value
            continue
        *above, key = path
        at = value
        for step in above:
            at = at[step]
        match one_of(draw, ["replace", "replace", "remove", "add", "deep"]):
            case "replace":
                at[key] = odd
            case "remove":
                del at[key]
            case "add" if isinstance(at, dict):
                at[one_of(draw, ["x", "", "\ud800", "name", "step", "a" * 999])] = odd
            case "deep":
                for _ in range(one_of(draw, [1, 99, 400])):
                    odd = [odd] if draw(st.booleans()) else {"a": odd}
                at[key] = odd
    return value


def as_json(values):
    """Files of one of ``values`` in JSON: damaged, or with other values."""
    seeds = [json.dumps(value).encode() for value in values]
    return damaged(seeds) | changed(values).map(lambda value: json.dumps(value).encode())


BOMB = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 40))


def as_yaml(texts):
    """Files of YAML, of which JSON is a part."""
    seeds = [text.encode() for text in (*texts, BOMB)]
    return damaged(seeds) | as_json([yaml.safe_load(text) for text in texts])


def as_lines(values):
    """Files of one of ``values`` a line."""
    seeds = ["".join(json.dumps(value) + "\n" for value in values).encode()]
    rows = st.lists(changed(values), min_size=1, max_size=3)
    return damaged(seeds) | rows.map(
        lambda rows: b"".join(json.dumps(row).encode() + b"\n" for row in rows)
    )


# Files that are right

USER, SAID = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}
CALL = {"function": {"name": "f", "arguments": '{"a": [1, "b"]}'}}
ROWS = [
    {"prompt": "hi", "completion": "ho", "label": True, "score": 0.5, "answer": "5"},
    {"prompt": [USER], "completion": [SAID], "tools": [{"name": "f"}]},
    {"prompt": [USER], "chosen": [SAID], "rejected": "ho"},
    {"prompt": "hi", "responses": ["a", "b"], "ranks": [1, 2], "steps": ["a"], "labels": [True]},
    {"messages": [USER, {"role": "assistant", "tool_calls": [CALL]}, SAID]},
    {"prompt": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]},
]
METRICS = [
    {"step": 0, "eval/gold": 0.5, "eval/proxy": 1.0, "eval/kl_nats": 0.0, "eval/gold_ci": 0.1},
    *(
        {"step": i, "reward": i / 9, "kl": 0.1 * i, "loss": None, "length": 5.0}
        for i in range(1, 14)
    ),
    {"step": 13, "eval/gold": 0.1, "eval/proxy": 2.0, "eval/kl_nats": 9.0, "eval/distinct_2": 0.1},
]
SAMPLES = [
    {
        "step": step,
        "split": split,
        "prompt": "a",
        "completion": "b c b c",
        "gold": 0.5,
        "reward": 1.0,
    }
    for step in (0, 1, 12, 13)
    for split in ("eval", "train")
]
SUMMARY = {
    "gold_before": 0.0, "gold_after": 0.5, "gold_ci_after": 0.1, "gold_rise": 0.5,
    "seconds": {"sample": 1.5}, "peak_memory_gib": 1.5, "tokens_per_second": 9,
    "reliability": {"predicted": [0.5, 0.9], "observed": [0.5, 1], "count": [10, 10]},
}  # fmt: skip
EVALUATION = {
    "models": {"policy": "run", "reference": "base", "against": "base"}, "step": 13, "n": 2,
    "rewards": {"proxy": ["a"], "gold": ["b"]}, "data": "x.jsonl", "prompts": 5,
    "policy": {"proxy": 4.0, "gold": 0.5, "gold_ci": 0.1}, "against": {"gold": 0.0},
    "win_rate": {"gold": 0.6, "gold_ci": None}, "pass_at_k": {"k": [1, 2], "rate": [0.3, 0.4]},
    "best_of_n": {"n": [1, 2], "kl_nats": [0.0, 0.2], "gold": [0.0, None], "proxy": [0, 1]},
    "equal_kl": {"kl_nats": 0.2, "proxy": 1.0, "gold": None},
}  # fmt: skip
DIAGNOSIS = {"step": 13, "findings": [{"name": "a", "severity": "problem", "evidence": "b"}]}
TEMPLATES = [
    CHATML.read_text(encoding="utf-8"),
    "{% for m in messages %}{{ m['role'] + ': ' + m.content | trim }}{{ eos_token }}{% endfor %}",
    "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% generation %}"
    "{{ m | tojson }}{{ 'x' * ns.n }}{% endgeneration %}{% endfor %}{{ tools }}",
    "{% macro f(x) %}{% if x %}{{ f(x[1:]) }}{% endif %}{{ x | length }}{% endmacro %}"
    "{{ f(messages) }}",
]
LOOPS = ["{% for i in range(99999) %}" * 3 + "{% endfor %}" * 3, "{{ 10**(10**9) }}"]
"""Each costs a process and two seconds: for ``make fuzz`` alone."""


class Folder:
    """A model's files, those that are right; made once."""

    def __init__(self, path):
        self.path = Path(path)
        rope = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}
        rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 64}
        more = {"rope_scaling": rope, "eos_token_id": [2]}
        rigged_folder(path, byte_level(bos=True), 300, 5, {"eos_token_id": 2}, config=more)
        (self.path / "whole.gguf").write_bytes(gguf_file(self.path / "x.gguf"))

    def bytes(self, name):
        return (self.path / name).read_bytes()

    def json(self, name):
        return json.loads(self.bytes(name))

    def index(self):
        header = self.tensors()
        return {"weight_map": {name: "model-1.safetensors" for name in header if name[0] != "_"}}

    def tensors(self):
        content = self.bytes("model.safetensors")
        return json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])

    def safetensors(self):
        """With another header, in front of the same tensors."""
        content = self.bytes("model.safetensors")
        rest = content[8 + int.from_bytes(content[:8], "little") :]

        def packed(header):
            text = json.dumps(header).encode()
            return len(text).to_bytes(8, "little") + text + rest

        return damaged([content]) | changed([self.tensors()]).map(packed)


def gguf_file(path):
    """A Llama of one layer with a byte-level tokenizer."""
    writer = gguf.GGUFWriter(path, "llama")
    for key in ("block_count", "attention.head_count", "attention.head_count_kv"):
        writer.add_uint32(f"llama.{key}", 1)
    for key, size in {
        "embedding_length": 8,
        "feed_forward_length": 8,
        "context_length": 64,
    }.items():
        writer.add_uint32(f"llama.{key}", size)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_float32("llama.rope.freq_base", 1e4)
    for key, text in {"model": "gpt2", "pre": "gpt-2"}.items():
        writer.add_string(f"tokenizer.ggml.{key}", text)
    writer.add_array("tokenizer.ggml.tokens", ["a", "b", "ab", "<end>"])
    writer.add_array("tokenizer.ggml.token_type", [1, 1, 1, 3])
    writer.add_array("tokenizer.ggml.merges", ["a b"])
    writer.add_uint32("tokenizer.ggml.eos_token_id", 3)
    writer.add_chat_template(TEMPLATES[1])
    layer = {"attn_q": (8, 8), "attn_k": (8, 8), "attn_v": (8, 8), "attn_output": (8, 8)}
    layer |= {"ffn_gate": (8, 8), "ffn_up": (8, 8), "ffn_down": (8, 8), "attn_norm": (8,)}
    shapes = {f"blk.0.{name}.weight": shape for name, shape in layer.items()}
    shapes |= {
        "blk.0.ffn_norm.weight": (8,),
        "token_embd.weight": (4, 8),
        "output_norm.weight": (8,),
    }
    for name, shape in shapes.items():
        writer.add_tensor(name, np.ones(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


# Readers: what they are given, and what is done with it


def read_all_rows(path):
    tokenizer = byte_level(template=TEMPLATES[0])
    rows = read_rows(str(path))
    failed = None
    for read in (read_prompts, *FORMATS.values()):
        # Of each kind of rows the first is an error; the last of them is what is said.
        try:
            encode_rows(read(rows, tokenizer), tokenizer, 300, 200)
        except InputError as error:
            failed = error
    if failed:
        raise failed


def read_config_yaml(path):
    dump(load(path))


def read_pipeline(path):
    for stage in load_pipeline(path).stages:
        if stage.train:
            stage_run(stage, "out", 0)


def read_model_config(path):
    for head in (False, True):
        with contextlib.suppress(InputError):
            read_config(path, head)
    is_reward_model(path)
    read_bias(path)
    list(_said(str(path.parent)))
    read_config(path)


def read_generation_config(path):
    json.dumps(read_generation(str(path.parent)), ensure_ascii=False).encode()
    list(_said(str(path.parent)))


def read_tokenizer(path):
    tokenizer = load_tokenizer(path.parent if path.suffix == ".json" else path)
    token_bytes(tokenizer)
    if tokenizer.chat_template:
        Writer(tokenizer, str(path)).text([USER, SAID], open_turn=True)
    for text in ("hello good bye", "é 電\n"):
        with contextlib.suppress(Exception):  # words that are in no vocabulary
            tokenizer.decode(tokenizer.encode(text))


def read_gguf_file(path):
    reading._open.cache_clear()  # of files of one size and one moment
    with contextlib.suppress(InputError):
        read_gguf(path)
    read_tokenizer(path)


def read_template(path):
    chat = chat_settings(DataConfig(chat_template=str(path)))
    writer = Writer(byte_level(), str(path), chat, {"tools": [{"name": "f"}]})
    writer.text([USER, SAID], open_turn=True)
    if writer.marks():
        writer.spans([USER, SAID])


def read_run_folder(path):
    with contextlib.suppress(InputError):
        render([run := read_run(path.parent)])
        render([run, run])
    examine(read_history(path.parent))


RUN = {
    "metrics.jsonl": METRICS, "samples.jsonl": SAMPLES, "summary.json": SUMMARY,
    "evaluation.json": EVALUATION, "diagnosis.json": DIAGNOSIS,
}  # fmt: skip
CONFIG = (CONFIGS / "ppo_tiny.yaml").read_text(encoding="utf-8")
PIPELINE = (CONFIGS / "pipelines" / "demo_tiny.yaml").read_text(encoding="utf-8")


@st.composite
def parquet(draw, path):
    """A table of some rows, whole or damaged."""
    rows = draw(st.lists(st.sampled_from(ROWS[:1] + ROWS[3:4]) | changed(ROWS[:1]), min_size=1))
    rows = [row for row in rows if isinstance(row, dict)]
    try:
        pq.write_table(pa.Table.from_pylist(rows), path)
    except (pa.ArrowException, UnicodeError, OverflowError, TypeError, ValueError):
        pq.write_table(pa.Table.from_pylist(ROWS[:1]), path)
    content = path.read_bytes()
    return content if draw(st.booleans()) else draw(damaged([content]))


def readers(model, loops):
    """Name of a file → what it may hold, and its reader."""
    templates = damaged([text.encode() for text in TEMPLATES * 25 + LOOPS * loops])
    names = ("tokenizer.json", "tokenizer_config.json")
    kinds = [model.path.parent / name for name in ("sentencepiece", "unigram")]
    tokenizers = {
        name: [model.json(name), *(json.loads((kind / name).read_bytes()) for kind in kinds)]
        for name in names
    }
    config = model.json("config.json")
    mistral = config | {"model_type": "mistral", "sliding_window": None, "rope_scaling": None}
    return {
        "rows.jsonl": (as_lines(ROWS), read_all_rows),
        "rows.parquet": (parquet(model.path / "made.parquet"), read_all_rows),
        "config.yaml": (as_yaml([CONFIG]), read_config_yaml),
        "pipeline.yaml": (as_yaml([PIPELINE]), read_pipeline),
        "config.json": (as_json([config, mistral]), read_model_config),
        "generation_config.json": (
            as_json([{"eos_token_id": [2, 5], "stop_strings": ["a"]}]),
            read_generation_config,
        ),
        "model.safetensors": (model.safetensors(), lambda path: read_hf(path.parent)),
        "model.safetensors.index.json": (as_json([model.index()]), read_sharded),
        **{name: (as_json(tokenizers[name]), read_tokenizer) for name in names},
        "chat_template.jinja": (templates, read_template),
        "whole.gguf": (damaged([model.bytes("whole.gguf")]), read_gguf_file),
        **{name: (as_json([RUN[name]]), read_run_folder) for name in RUN if name[-1] != "l"},
        **{name: (as_lines(RUN[name]), read_run_folder) for name in RUN if name[-1] == "l"},
        "run/config.yaml": (as_yaml([CONFIG]), read_run_folder),
    }


RUN_FILES = 6
NAMES = (
    "rows.jsonl", "rows.parquet", "config.yaml", "pipeline.yaml", "config.json",
    "generation_config.json", "model.safetensors", "model.safetensors.index.json",
    "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "whole.gguf",
    "metrics.jsonl", "samples.jsonl", "summary.json", "evaluation.json", "diagnosis.json",
    "run/config.yaml",
)  # fmt: skip
"""The last ``RUN_FILES`` of them are those of a run's folder."""


def read_sharded(path):
    whole = path.parent / "model.safetensors"
    if whole.exists():
        whole.rename(path.parent / "model-1.safetensors")
    read_hf(path.parent)


@pytest.fixture(autouse=True, scope="module")
def collector():
    """It passes over what the tests before have left, which alone can take it a second or two."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def model(tmp_path):
    for name, tokenizer in {"sentencepiece": sentencepiece(), "unigram": unigram()}.items():
        tokenizer.save_pretrained(tmp_path / name)
    return Folder(tmp_path / "model")


class HangError(BaseException):
    """No Exception, so that no reader takes it for the fault of a file."""


def stop(*_):
    raise HangError


def check(read, path, content):
    """Read a file under the limits; a second time if the first was too slow, since a machine that
    is shared may halt."""
    if timed(read, path, content) >= SECONDS:
        assert timed(read, path, content) < SECONDS


def timed(read, path, content):
    """Read a file: seconds of processor time."""
    path.write_bytes(content)
    forget_peak()
    before, began = occupied("VmRSS"), time.process_time()
    signal.setitimer(signal.ITIMER_VIRTUAL, 10 * SECONDS)
    try:
        read(path)
    except InputError as error:
        said = str(error)
        assert visible(said) == said
        assert len(said) <= LONGEST
        assert path.name in said or str(path.parent) in said, said
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
    took = time.process_time() - began
    assert occupied("VmHWM") - before < BYTES + len(content)
    return took


@pytest.mark.parametrize("name", NAMES)
def test_reader(name, model, request):
    inputs = request.config.getoption("inputs")
    # Of the reader of a run's folder, all of whose files are looked at for each of them.
    share = inputs // RUN_FILES if NAMES.index(name) >= len(NAMES) - RUN_FILES else inputs
    found = readers(model, loops=inputs > IN_CI)
    assert set(found) == set(NAMES)
    contents, read = found[name]
    folder = model.path
    if read is read_run_folder:
        (folder / "run").mkdir()
        folder = folder / "run"
        (folder / "config.yaml").write_text(CONFIG, encoding="utf-8")
        for other, values in RUN.items():
            values = values if other[-1] == "l" else [values]
            text = "".join(json.dumps(value) + "\n" for value in values)
            (folder / other).write_text(text, encoding="utf-8")
    path = folder / Path(name).name
    signal.signal(signal.SIGVTALRM, stop)

    @settings(
        max_examples=share,
        derandomize=inputs == IN_CI,
        database=None,
        deadline=None,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(contents)
    def each(content):
        check(read, path, content)

    each()
