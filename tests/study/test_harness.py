"""Our models in lm-evaluation-harness, beside its own backend for the same folder."""

import json

import pytest
import tiny_models
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from jaxrlhf.core.errors import InputError

lm_eval = pytest.importorskip("lm_eval", reason="an extra: lm-eval")
pytest.importorskip("accelerate", reason="the harness's own backend needs it")

from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402

from jaxrlhf.study import harness  # noqa: E402

CONTEXT = 48


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("model"))
    tokenizer = tiny_models.byte_level(bos=True)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=40, max_position_embeddings=CONTEXT,
        pad_token_id=0, eos_token_id=2, bos_token_id=1, initializer_range=0.3,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def both(folder):
    theirs = HFLM(pretrained=folder, device="cpu", dtype="float32", batch_size=4)
    return harness.JaxLM(folder, batch_size=2), theirs


def asked(kind, *arguments):
    return [Instance(kind, {}, given, i) for i, given in enumerate(arguments)]


PAIRS = (
    ("he", "llo good"),
    ("good ", "bye"),  # the space goes to the continuation
    ("", "hello"),  # no context
    ("<bos>bye", " good"),  # the text has the token that the tokenizer would add
    ("hello " * 30, "good bye"),  # does not fit: cut on the left
    ("one two three", " four"),
)


def test_loglikelihood_is_the_hf_backends(both):
    ours, theirs = (model.loglikelihood(asked("loglikelihood", *PAIRS)) for model in both)
    assert [logp for logp, _ in ours] == pytest.approx([logp for logp, _ in theirs], abs=1e-4)
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs]


def test_greedy_continuations_are_told_from_others(both):
    """Of all tokens that may follow, the same one is greedy for both."""
    ours, theirs = both
    context = ours.tok_encode("good")
    with torch.no_grad():
        logit_V = theirs.model(torch.tensor([context])).logits[0, -1]
    first, second = logit_V.topk(2).indices.tolist()
    asked_for = [(None, context, [first]), (None, context, [second])]
    assert [greedy for _, greedy in ours._loglikelihood_tokens(asked_for)] == [True, False]


def test_rolling_is_the_hf_backends(both):
    texts = (("hello good bye",), ("one two three four " * 8,), ("x",))
    ours, theirs = (
        model.loglikelihood_rolling(asked("loglikelihood_rolling", *texts)) for model in both
    )
    assert ours == pytest.approx(theirs, abs=1e-4 * 8)  # of up to eight windows


def test_generate_until_is_the_hf_backends(both):
    greedy = {"until": ["o"], "max_gen_toks": 6, "do_sample": False}
    requests = [(text, greedy) for text in ("hello", "good bye", "he " * 40)]
    requests.append(("no", {"until": "\n\n", "max_gen_toks": 4}))
    ours, theirs = (model.generate_until(asked("generate_until", *requests)) for model in both)
    assert ours == theirs
    assert not any("o" in text for text in ours[:3])


@pytest.mark.harness
def test_a_task_of_a_file(both, tmp_path):
    """By the harness itself, no network: a choice of two, and its accuracy."""
    ours, _ = both
    path = tmp_path / "task.jsonl"
    rows = [
        {"question": q, "options": ["good", "bye"], "right": i % 2} for i, q in enumerate("abcd")
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    task = {
        "task": "mine", "dataset_path": "json", "test_split": "test",
        "dataset_kwargs": {"data_files": {"test": str(path)}, "cache_dir": str(tmp_path)},
        "output_type": "multiple_choice", "doc_to_text": "{{question}}: ",
        "doc_to_choice": "{{options}}", "doc_to_target": "right",
    }  # fmt: skip
    found = lm_eval.simple_evaluate(model=ours, tasks=[task], bootstrap_iters=0)
    pairs = [(f"{row['question']}: ", f" {word}") for row in rows for word in row["options"]]
    logp = [x for x, _ in ours.loglikelihood(asked("loglikelihood", *pairs))]
    right = [
        (logp[2 * i + row["right"]] > logp[2 * i + 1 - row["right"]]) for i, row in enumerate(rows)
    ]
    assert found["results"]["mine"]["acc,none"] == sum(right) / 4


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"batch_size": "auto"}, "batch_size=auto: must be a whole number"),
        ({"max_length": 99}, "max_length=99: must be 2 to 48"),
    ],
)
def test_refusals(folder, given, message):
    with pytest.raises(InputError, match=message):
        harness.JaxLM(folder, **given)


@pytest.mark.parametrize(
    ("asked_for", "message"),
    [
        ({"repetition_penalty": 2.0}, "repetition_penalty: this sampler has no such setting"),
        ({"max_gen_toks": 48}, "max_gen_toks=48: must be 1 to 47"),
    ],
)
def test_what_the_sampler_lacks_is_said(both, asked_for, message):
    with pytest.raises(InputError, match=message):
        both[0].generate_until(asked("generate_until", ("a", {"until": ["."], **asked_for})))
