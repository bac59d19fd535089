"""What ends a response: read once from all that a model's files say, and no id that has no text."""

import json
from dataclasses import replace

import pytest
import tiny_models

from jaxrlhf.config import Config, ModelConfig, SampleConfig, SFTConfig, save
from jaxrlhf.core.errors import InputError
from jaxrlhf.models.ends import generation_config, read_ends, read_generation, unused_ids
from jaxrlhf.models.gguf import smollm2_path
from jaxrlhf.models.tokenizer import load_tokenizer

TOKENIZER = tiny_models.byte_level()
SIZE = len(TOKENIZER)
EOS, END, PAD = TOKENIZER.convert_tokens_to_ids(["<eos>", "<|end|>", "<pad>"])


@pytest.fixture
def folder(tmp_path):
    def make(**said):
        return tiny_models.rigged_folder(tmp_path / "model", TOKENIZER, 300, **said)

    return make


def run_of(tmp_path, path, name="run", **sample):
    (tmp_path / name).mkdir()
    config = Config(SFTConfig(), ModelConfig(path), sample=SampleConfig(**sample))
    save(config, tmp_path / name / "config.yaml")
    return str(tmp_path / name)


@pytest.mark.parametrize(
    ("generation", "config", "stop"),
    [
        (None, {}, (EOS,)),
        (None, {"eos_token_id": END}, (EOS, END)),
        (None, {"eos_token_id": [END, EOS]}, (EOS, END)),
        ({"eos_token_id": [EOS, END]}, {}, (EOS, END)),
        ({"eos_token_id": 200}, {"eos_token_id": END}, (EOS, 200, END)),
        ({"eos_token_id": None}, {"eos_token_id": None}, (EOS,)),
    ],
)
def test_read_ends_joins_tokenizer_and_files(folder, generation, config, stop):
    ends = read_ends(folder(generation=generation, config=config), TOKENIZER, 300)
    assert (ends.stop, ends.strings, ends.pad) == (stop, (), PAD)


def test_read_ends_of_a_run_adds_what_it_was_trained_with(folder, tmp_path):
    start = folder(generation={"eos_token_id": END, "stop_strings": "\n\n"})
    first = run_of(tmp_path, start, stop=(200,))
    second = run_of(tmp_path, first, "second", stop_strings=("###",))
    ends = read_ends(second, TOKENIZER, 300)
    assert (ends.stop, ends.strings) == ((EOS, END, 200), ("\n\n", "###"))
    sample = ends.settle(SampleConfig(stop=(210, END), stop_strings=("Q:", "###")))
    assert sample.stop == (EOS, END, 200, 210)
    assert sample.stop_strings == ("\n\n", "###", "Q:")
    assert (sample.pad, sample.forbidden) == (PAD, ((SIZE, 300),))
    assert ends.settle(sample) == sample


def test_read_ends_of_gguf():
    tokenizer = load_tokenizer("smollm2")
    ends = read_ends("smollm2", tokenizer, 49152)
    assert ends.stop == (tokenizer.convert_tokens_to_ids("<|im_end|>"),)
    assert ends == read_ends(str(smollm2_path()), tokenizer, 49152)
    assert (ends.unused, ends.note()) == ((), "")


@pytest.mark.parametrize(
    ("generation", "config", "message"),
    [
        (
            {"eos_token_id": 300},
            {},
            "generation_config.json: eos_token_id: 300 is none of the .*300",
        ),
        (None, {"eos_token_id": [1, 777]}, "config.json: eos_token_id: 777 is none"),
        ({"eos_token_id": "</s>"}, {}, "eos_token_id='</s>': give a token id"),
        ({"eos_token_id": [True]}, {}, r"eos_token_id=\[True\]: give a token id"),
        ({"eos_token_id": -1}, {}, "eos_token_id=-1: give a token id"),
        ({"stop_strings": ["a", ""]}, {}, r"stop_strings=\['a', ''\]: give a text"),
        ([], {}, "generation_config.json: not a JSON object"),
    ],
)
def test_read_ends_refuses(folder, generation, config, message):
    with pytest.raises(InputError, match=message):
        read_ends(folder(generation=generation, config=config), TOKENIZER, 300)


def test_settle_refuses_an_id_that_the_model_lacks():
    with pytest.raises(InputError, match=r"sample\.stop: 300 is none of the model's 300 token ids"):
        read_ends("", TOKENIZER, 300).settle(SampleConfig(stop=(300,)))


def test_settle_refuses_to_forbid_what_it_would_not():
    ends = read_ends("", TOKENIZER, 300)
    with pytest.raises(
        InputError, match=r"sample\.forbidden=\[\[22, 23\]\]: a run forbids .* leave"
    ):
        ends.settle(SampleConfig(forbidden=((22, 23),)))
    assert ends.settle(SampleConfig(forbidden=((SIZE, 300),))).forbidden == ((SIZE, 300),)


def test_unused_ids_are_those_between_and_after_the_tokens(tmp_path):
    TOKENIZER.save_pretrained(tmp_path)
    path = tmp_path / "tokenizer.json"
    said = json.loads(path.read_text(encoding="utf-8"))
    vocab = said["model"]["vocab"]
    # Tokens 100 and 101 move to the end, and leave a hole.
    for text in [text for text, token in vocab.items() if token in (100, 101)]:
        vocab[text] += SIZE - 100 + 3
    said["model"]["merges"] = []
    path.write_text(json.dumps(said), encoding="utf-8")
    tokenizer = load_tokenizer(tmp_path)
    wanted = ((100, 102), (SIZE, SIZE + 3), (SIZE + 5, 400))
    assert unused_ids(tokenizer, 400) == wanted
    ends = replace(read_ends("", tokenizer, 400), unused=wanted)
    count = 2 + 3 + 400 - SIZE - 5
    assert ends.note().startswith(f"{count} ids of the model are no tokens of its tokenizer")
    assert unused_ids(tokenizer, 400, stop=[101]) == ((100, 101), *wanted[1:])


def test_pad_beyond_the_embedding_is_another_id():
    tokenizer = tiny_models.byte_level()
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    assert tokenizer.pad_token_id == SIZE
    assert read_ends("", tokenizer, SIZE).pad == EOS


def test_generation_config_is_the_starts_with_the_record_in_it(folder, tmp_path):
    said = {"temperature": 0.6, "top_p": 0.9, "do_sample": True, "eos_token_id": EOS}
    start = folder(generation=said)
    run = run_of(tmp_path, start, stop=(END,), stop_strings=("###",))
    ends = read_ends(run, TOKENIZER, 300)
    assert read_generation(run) == said
    assert generation_config(ends, read_generation(run), TOKENIZER) == {
        **said,
        "bos_token_id": TOKENIZER.bos_token_id,
        "pad_token_id": PAD,
        "eos_token_id": [EOS, END],
        "stop_strings": ["###"],
    }
    assert read_generation("smollm2") == read_generation("") == {}
