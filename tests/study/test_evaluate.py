"""Measuring a trained policy on held-out prompts, from its folder to evaluation.json."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
import runs
import tiny_models

from jaxrlhf.apps import cli
from jaxrlhf.config import (
    Config,
    DataConfig,
    EvalConfig,
    EvaluateConfig,
    MeshConfig,
    RewardConfig,
    SFTConfig,
    dump,
    save,
)
from jaxrlhf.core.errors import InputError
from jaxrlhf.core.stats import maj_at_k, pass_at_k
from jaxrlhf.data.tokens import load_data
from jaxrlhf.data.words import goodness
from jaxrlhf.mesh.sharding import make_mesh
from jaxrlhf.rewards.judge import Judge, load_rewards
from jaxrlhf.run import loop
from jaxrlhf.run.folder import read_run
from jaxrlhf.study import evaluate
from jaxrlhf.study.evaluate import _mesh_config, _new_tokens, _prompts, evaluate_model, shape_of

GOLD = "jaxrlhf.data.words:goodness"


def one_device(config):
    return make_mesh(config.mesh, jax.devices()[:1])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    config = runs.ppo(folder, steps=3, eval=EvalConfig(gold=(runs.GOODNESS,)))
    held_out = [{"prompt": f"{w} the"} for w in ("good", "bad", "cold", "good", "warm", "sad")]
    config = replace(
        config, data=replace(config.data, eval=runs.write(folder / "held_out.jsonl", held_out))
    )
    loop.train(config, one_device(config))
    return config


@pytest.fixture(scope="module")
def found(run):
    wish = EvaluateConfig(run.output, n=4, best_of=8, rows=16)
    return evaluate_model(wish, one_device(run))


def test_evaluate_model_measures_what_it_writes(found, run):
    with open(f"{run.output}/evaluation.json") as file:
        written = json.load(file)
    assert written == json.loads(json.dumps(found))
    assert found["step"] == 3
    assert found["prompts"] == 5  # one of the six stands there twice
    rows = found["completions"]
    assert len(rows) == 5 * 4
    scores = goodness([], [row["completion"] for row in rows])
    np.testing.assert_allclose([row["gold"] for row in rows], scores, rtol=1e-6)
    assert found["policy"]["gold"] == pytest.approx(np.mean(scores))
    assert found["policy"]["gold"] == found["policy"]["proxy"]
    kl = np.array([row["kl_nats"] for row in rows]).reshape(5, 4).mean(1)
    assert found["policy"]["kl_nats"] == pytest.approx(kl.mean())
    half = 2.776445 * kl.std(ddof=1) / 5**0.5  # Student's, with four degrees of freedom
    assert found["policy"]["kl_nats_ci"] == pytest.approx(half)
    assert found["policy"]["kl_nats"] > 1e-4  # three updates have moved it
    assert found["policy"]["unknown"] == 0


def test_evaluate_model_draws_the_baseline_from_the_reference(found):
    curve = found["best_of_n"]
    assert curve["n"] == [1, 2, 4, 8]
    assert curve["kl_nats"][0] == pytest.approx(0, abs=1e-12)
    assert 0 < curve["kl_nats"][1] <= np.log(2) - 0.5  # some completions score the same
    assert curve["proxy"] == sorted(curve["proxy"])  # chosen by it, so more are better
    assert curve["proxy"][-1] > found["policy"]["proxy"]
    assert found["equal_kl"]["kl_nats"] == found["policy"]["kl_nats"]
    assert 0 < found["win_rate"]["gold"] < 1
    # its n = 1 is the mean of 8 samples, and the opponent's figure that of the first 4 of them
    assert curve["gold"][0] == pytest.approx(found["against"]["gold"], abs=0.35)


def test_evaluate_model_against_itself(run, tmp_path):
    wish = EvaluateConfig(run.output, against=run.output, n=4, best_of=0, output=str(tmp_path))
    found = evaluate_model(wish, one_device(run))
    assert found["win_rate"]["gold"] == pytest.approx(0.5, abs=found["win_rate"]["gold_ci"] + 0.1)
    assert found["policy"]["gold"] != found["against"]["gold"]  # each has draws of its own
    assert "best_of_n" not in found
    assert (tmp_path / "evaluation.json").exists()


def test_evaluate_model_is_the_same_on_any_mesh(found, run, tmp_path):
    wish = EvaluateConfig(run.output, n=4, best_of=0, rows=4, output=str(tmp_path))
    mesh = make_mesh(MeshConfig(data=2, fsdp=2), jax.devices()[:4])
    split = evaluate_model(wish, mesh)
    assert split["policy"] == pytest.approx(found["policy"], rel=1e-4)
    texts = [[row["completion"] for row in each["completions"]] for each in (found, split)]
    assert texts[0] == texts[1]


@pytest.mark.parametrize("rows", [2, 4, 12])
def test_evaluate_model_draws_the_same_in_any_batches(rows, found, run, tmp_path):
    """Less than one prompt at once, one prompt, three, and (``found``) four."""
    wish = EvaluateConfig(run.output, n=4, best_of=8, rows=rows, output=str(tmp_path))
    other = evaluate_model(wish, one_device(run))
    texts = [[row["completion"] for row in each["completions"]] for each in (found, other)]
    assert texts[0] == texts[1]
    assert len(set(texts[0])) > 15  # draws that differ from each other
    assert other["best_of_n"]["gold"] == pytest.approx(found["best_of_n"]["gold"], rel=1e-4)


def test_evaluate_model_compiles_once(run, tmp_path, monkeypatch):
    traced = runs.count_traces(monkeypatch, evaluate, _sample=(0, 5), _score=(0, 1))
    wish = EvaluateConfig(run.output, n=3, best_of=0, rows=6, output=str(tmp_path))
    evaluate_model(wish, one_device(run))  # 3 batches of each network
    assert sorted(traced) == ["_sample", "_score"]


def test_evaluate_model_of_a_run_from_rows(tmp_path):
    config = runs.of("dpo", tmp_path, steps=1)
    config = replace(config, data=replace(config.data, max_tokens=17))
    loop.train(config, one_device(config))
    wish = EvaluateConfig(config.output, n=2, best_of=2, reward=GOLD)
    found = evaluate_model(wish, one_device(config))
    assert found["prompts"] == 10
    assert found["step"] == 1
    assert found["max_new_tokens"] == config.data.max_tokens - 1 == 16  # prompts are one word
    assert found["rewards"] == {"gold": [GOLD]}
    assert found["best_of_n"]["n"] == [1, 2]


def test_evaluate_model_of_a_plain_model(run, tmp_path):
    out = str(tmp_path / "hf")
    assert cli.main(["export", run.output, out]) == 0
    wish = EvaluateConfig(
        out, data=run.data.eval, reward=GOLD, n=2, best_of=4, max_new_tokens=8, rows=8
    )
    with pytest.raises(InputError, match="output: missing"):
        evaluate_model(wish)
    found = evaluate_model(replace(wish, output=out), one_device(run))
    assert found["best_of_n"]["n"] == [1, 2, 4]  # its own
    assert "kl_nats" not in found["policy"]
    assert found["step"] is None
    assert "win_rate" not in found
    wish = replace(wish, output=out, reference=run.output, best_of=0)
    assert evaluate_model(wish, one_device(run))["policy"]["kl_nats"] == pytest.approx(0, abs=1e-3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n": 0}, "n=0: must be at least 1"),
        ({"best_of": -1}, "best_of=-1: must be at least 0"),
        ({"reward": "a", "reward_model": "b"}, "both given"),
        ({"max_new_tokens": 63}, "exceed the context of model, 64"),
        ({"data": "no.jsonl"}, "no.jsonl"),
    ],
)
def test_evaluate_model_refuses(change, message, run):
    with pytest.raises(InputError, match=message):
        evaluate_model(replace(EvaluateConfig(run.output), **change), one_device(run))


def test_nothing_is_read_for_what_cannot_be_written(run, tmp_path, monkeypatch, capsys):
    for module in ("study.evaluate.read_entrants", "models.load.load_model"):
        monkeypatch.setattr(f"jaxrlhf.{module}", None)
    (tmp_path / "file").write_text("")
    out = str(tmp_path / "file/x")
    for words in (["eval", run.output, "--output", out], ["export", run.output, out]):
        assert cli.main(words) == 2
        err = capsys.readouterr().err
        assert re.match(r"error: \S*/file\S*: cannot be written \(.*\): give another path\n", err)


def test_evaluate_model_says_what_it_skips(run, found, tmp_path, capsys):
    rows = [{"prompt": f"{word} the"} for word in ("good", "bad", "cold")]
    data = runs.write(tmp_path / "rows.jsonl", [*rows[:1], {"prompt": 7}, *rows[1:], {"x": "y"}])
    wish = EvaluateConfig(run.output, data=data, output=str(tmp_path), n=1, best_of=0)
    with pytest.raises(InputError, match=r"rows.jsonl:2"):
        evaluate_model(wish, one_device(run))
    config = replace(run, data=replace(run.data, skip_bad_rows=True), output=str(tmp_path / "run"))
    shutil.copytree(run.output, config.output)
    save(config, f"{config.output}/config.yaml")
    skipping = evaluate_model(replace(wish, model=config.output), one_device(run))
    assert (skipping["prompts"], skipping["rows_skipped"]) == (3, 2)
    assert re.search(r"rows.jsonl: 2 skipped; first: .*rows.jsonl:2", capsys.readouterr().out)
    assert "rows_skipped" not in found


def test_evaluate_model_refuses_reward_models(tmp_path):
    config = runs.reward_model(tmp_path)
    Path(config.output).mkdir()
    save(config, f"{config.output}/config.yaml")
    with pytest.raises(InputError, match="a reward model, which completes nothing"):
        evaluate_model(EvaluateConfig(config.output))


def test_prompts_of_rows_are_those_that_are_learnt(tmp_path):
    """A tokenizer that begins texts with a token of its own, and a template that does not."""
    tokenizer = tiny_models.byte_level(bos=True)
    chat = [{"role": "user", "content": "hi"}]
    rows = [{"prompt": chat, "completion": [{"role": "assistant", "content": "good"}]}]
    path = runs.write(tmp_path / "rows.jsonl", rows)
    config = Config(SFTConfig(), data=DataConfig(path, eval=path))
    (learnt,) = load_data(config, path, tokenizer, 10**6).items
    (measured,) = _prompts(path, config, tokenizer, 10**6, own=True).items
    assert measured.prompt == learnt.prompt
    assert tokenizer.bos_token_id not in measured.prompt


def test_new_tokens_refuses_a_handful():
    config = Config(algorithm=SFTConfig(), data=DataConfig(max_tokens=40))
    assert _new_tokens(config, True, 24) == 16
    for width, left in ((25, 15), (40, 0), (50, 0)):
        with pytest.raises(InputError, match=rf"leaves {left} after the .*: give --max-new-tokens"):
            _new_tokens(config, True, width)


def test_main_eval(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(evaluate, "make_mesh", lambda config: one_device(run))
    words = ["eval", run.output, "--n", "4", "--best-of", "8", "--rows", "16", "--output"]
    assert cli.main([*words, str(tmp_path)]) == 0
    out = " ".join(capsys.readouterr().out.split())  # lines break where the path is long
    assert "on 5 held-out prompts, 4 each" in out
    assert "KL to the reference, nats" in out
    assert "Best of n, without training" in out
    assert cli.main(["eval", run.output, "--n", "0"]) == 2
    assert capsys.readouterr().err == "error: n=0: must be at least 1\n"
    assert cli.main(["eval", "smollm2", "--output", str(tmp_path)]) == 2
    assert "data: missing" in capsys.readouterr().err


URL = "memory://bucket/run"


def test_figures_of_a_url_stand_beside_the_run(run, found, store, monkeypatch, capsys):
    """At its URL, where a report finds them."""
    for path in filter(Path.is_file, Path(run.output).rglob("*")):
        store.pipe_file(f"/bucket/run/{path.relative_to(run.output)}", path.read_bytes())
    monkeypatch.setattr(evaluate, "make_mesh", lambda config: one_device(run))
    assert cli.main(["eval", URL, "--n", "4", "--best-of", "8", "--rows", "16"]) == 0
    assert "on 5 held-out prompts, 4 each" in capsys.readouterr().out
    written = json.loads(store.cat_file("/bucket/run/evaluation.json"))
    assert written["models"]["policy"] == URL
    assert written["policy"] == pytest.approx(found["policy"])
    assert read_run(URL).evaluation == written
    assert not any("writable" in name for name in store.find("/bucket"))


def test_figures_that_a_store_does_not_take_are_not_lost(store, tmp_path, monkeypatch):
    """Who may not write there learns it before anything is measured; else they are in a file."""
    config = runs.ppo(tmp_path)
    store.pipe_file("/bucket/run/config.yaml", dump(config).encode())
    store.pipe_file("/bucket/run/checkpoints/1/state", b"")
    wish = EvaluateConfig(URL, n=4)

    def refuse(fs, path, *_, **__):
        if path.endswith(refused):
            raise PermissionError("Forbidden")

    monkeypatch.setattr(type(store), "pipe_file", refuse)
    monkeypatch.setattr(evaluate, "_measure", lambda *_: pytest.fail("measured"))
    refused = ".writable"
    with pytest.raises(InputError, match=rf"^output={URL}/evaluation\.json: cannot be written \("):
        evaluate_model(wish, one_device(config))
    monkeypatch.setattr(evaluate, "_measure", lambda *_: {"n": 4})
    refused = "evaluation.json"
    with pytest.raises(InputError, match=r"\(.*Forbidden.*\): (\S+) has it") as error:
        evaluate_model(wish, one_device(config))
    kept = Path(re.search(r"(/\S+/evaluation\.json) has it", str(error.value))[1])
    assert json.loads(kept.read_text(encoding="utf-8")) == {"n": 4}
    shutil.rmtree(kept.parent)


def test_train_writes_a_report(run):
    assert "Gold against proxy" in Path(run.output, "report.html").read_text()


def test_shape_of_batches():
    assert shape_of(count=45, n=64, rows=64) == (1, 64, 1)
    assert shape_of(count=45, n=8, rows=64) == (8, 8, 1)
    assert shape_of(count=3, n=8, rows=64) == (3, 8, 1)
    assert shape_of(count=45, n=100, rows=64) == (1, 50, 2)


def test_evaluate_model_asks_the_verifier_what_an_answer_is(run, tmp_path):
    rows = [{"prompt": f"{word} the", "answer": word} for word in ("good", "bad", "cold")]
    data = runs.write(tmp_path / "rows.jsonl", rows)
    verifier = RewardConfig(verifier="exact")
    config = replace(run, eval=replace(run.eval, gold=(verifier,)), output=str(tmp_path / "run"))
    shutil.copytree(run.output, config.output)
    save(config, f"{config.output}/config.yaml")
    wish = EvaluateConfig(config.output, data=data, n=4, best_of=0, max_new_tokens=1)
    found = evaluate_model(wish, one_device(run))
    truth_QN = [[row["answer"]] * 4 for row in rows]
    said_QN = np.array([row["completion"] for row in found["completions"]]).reshape(3, 4)
    right_QN = (said_QN == truth_QN).astype(float)
    assert found["correct_at"] == 1
    for k, rate in zip((1, 2, 4), found["pass_at_k"]["rate"], strict=True):
        assert rate == pytest.approx(pass_at_k(right_QN, k).mean())
    answers = [[text or None for text in row] for row in said_QN.tolist()]
    assert found["maj_at_k"]["rate"][-1] == pytest.approx(maj_at_k(answers, right_QN, 4).mean())


@pytest.mark.parametrize("special", [None, False])
def test_evaluate_model_votes_by_the_text_that_the_verifier_judges(
    run, tmp_path, monkeypatch, special
):
    """Three answer Rome, each after another word, and two Paris after the same: without the tags,
    which people are not shown, Paris wins."""
    tokenizer = runs.tags_tokenizer(tmp_path / "tokenizer")
    said = [("or", "Rome"), ("and", "Rome"), ("the", "Rome"), ("a", "Paris"), ("a", "Paris")]
    texts = [f"{word} <answer> {city} </answer> <eos>" for word, city in said]
    ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
    draw = evaluate._sample

    def sample(*args, **kwargs):
        rollout = draw(*args, **kwargs)
        mask_BT = rollout.mask_BT.at[:, -5:].set(1)
        token_BT = rollout.token_BT.at[:, -5:].set(np.array(ids))
        ended_B = np.ones(len(token_BT), bool)
        attention_BT = rollout.attention_mask_BT.at[:, -5:].set(1)
        new = {"token_BT": token_BT, "mask_BT": mask_BT, "ended_B": ended_B}
        return replace(rollout, attention_mask_BT=attention_BT, **new)

    monkeypatch.setattr(evaluate, "_sample", sample)
    data = runs.write(tmp_path / "rows.jsonl", [{"prompt": "the", "answer": "Rome"}])
    gold = RewardConfig(verifier="exact", special_tokens=special)
    model = replace(run.model, tokenizer=str(tmp_path / "tokenizer"))
    config = replace(run, eval=replace(run.eval, gold=(gold,)), model=model)
    config = replace(config, output=str(tmp_path / "run"))
    shutil.copytree(run.output, config.output)
    save(config, f"{config.output}/config.yaml")
    wish = EvaluateConfig(config.output, data=data, n=5, best_of=0, max_new_tokens=5)
    found = evaluate_model(wish, one_device(run))
    right = special is None
    assert found["policy"]["gold"] == pytest.approx(0.6 * right)
    assert found["maj_at_k"]["rate"][-1] == right
    shown = [" ".join(pair) for pair in said]
    assert [row["completion"] for row in found["completions"]] == shown
    judge = Judge(load_rewards((gold,)), (None,), tokenizer, None)
    assert evaluate.text_of(judge) == ("text_special" if right else "text")


def test_mesh_of_an_evaluation_is_the_runs_on_the_devices_that_are_here():
    config = Config(mesh=MeshConfig(data=64, fsdp=2, tensor=2, context=2, slices=4))
    wish = EvaluateConfig(model="", tensor=4)
    assert _mesh_config(wish, config) == MeshConfig(data=-1, fsdp=2, tensor=4, context=2)
