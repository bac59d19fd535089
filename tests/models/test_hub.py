"""Models by their names on the hub, a fake one on the loopback: fetched once, pinned, read offline,
pushed; and one line where that fails."""

import json
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
import runs
from hub import COMMIT, believe_in, hub
from huggingface_hub import constants

from jaxrlhf.apps import cli
from jaxrlhf.config import Config, MeshConfig, ModelConfig, ReferenceConfig, RewardConfig, load
from jaxrlhf.core.errors import InputError
from jaxrlhf.mesh.sharding import make_mesh
from jaxrlhf.models.hf import read_hf, write_hf
from jaxrlhf.models.hub import HEADER, fetch, fetch_all, local, split_name
from jaxrlhf.models.load import load_model
from jaxrlhf.models.read import kept_dtypes, read_decoder
from jaxrlhf.models.tokenizer import load_tokenizer
from jaxrlhf.run import loop

MESH = make_mesh(MeshConfig(), jax.devices()[:1])
PINNED = f"org/tiny@{COMMIT}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory, random_params, tiny):
    out = tmp_path_factory.mktemp("model") / "tiny"
    decoder = replace(tiny, vocab=16)
    write_hf(out, decoder, random_params(decoder), load_tokenizer(f"words:{runs.WORDS}"))
    return out


@pytest.fixture
def server(folder, tmp_path, monkeypatch):
    """A hub with org/tiny, which has a pickle too, and an empty cache."""
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    with hub({("models", "org/tiny"): {**files, "pytorch_model.bin": b"\x80"}}) as server:
        believe_in(server, monkeypatch, tmp_path / "cache")
        monkeypatch.chdir(tmp_path)
        yield server


def test_load_model_of_a_name(server, folder):
    model, params, tokenizer = load_model("org/tiny", MESH)
    assert model.decoder == read_hf(folder)[0]
    jax.tree.map(np.testing.assert_array_equal, params, read_hf(folder)[1])
    assert tokenizer.encode("good") == [2]
    assert not any("pytorch_model" in path for path in server.asked)
    # From then on nobody asks for what is there.
    server.asked.clear()
    assert fetch(PINNED) == PINNED
    assert read_decoder(PINNED) == read_decoder("org/tiny") == model.decoder
    assert server.asked == []


def test_a_folder_of_that_name_goes_first(server, tmp_path):
    (tmp_path / "org" / "tiny").mkdir(parents=True)
    assert fetch("org/tiny") == local("org/tiny") == "org/tiny"
    assert server.asked == []


@pytest.mark.parametrize(
    "path",
    ["", "smollm2", "a.gguf", "org/a.gguf", "/a/b", "./a", "a/b/c", "words:a/b", "../a", "a\0/b"],
)
def test_what_is_no_name(path):
    assert split_name(path) is None


def test_offline_the_cache_is_read(server, monkeypatch):
    assert fetch("org/tiny") == PINNED
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    server.asked.clear()
    assert fetch("org/tiny") == fetch("org/tiny@main") == PINNED
    with pytest.raises(InputError, match=r"org/other.*cache has it not.*hf download org/other"):
        fetch("org/other")
    assert server.asked == []


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("org/other", "no such repository, or a private one: set HF_TOKEN"),
        ("org/tiny@v2", "no such revision"),
    ],
)
def test_what_the_hub_has_not(server, path, message):
    with pytest.raises(InputError, match=f"{path}.*{message}.*hf download") as caught:
        load_model(path, MESH)
    assert "\n" not in str(caught.value)


def test_no_network(server, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(InputError, match="cannot be reached, and the cache has it not"):
        fetch("org/tiny")


def test_a_plan_fetches_the_shape_alone(server):
    server.repositories["models", "org/tiny"]["config.json"] = json.dumps(
        json.loads(server.repositories["models", "org/tiny"]["config.json"])
        | {"torch_dtype": "bfloat16"}
    ).encode()
    assert fetch("org/tiny", HEADER) == PINNED
    assert read_decoder(PINNED).vocab == 16
    assert kept_dtypes(PINNED)(None) == "bfloat16"
    assert not any("safetensors" in path for path in server.asked)


def test_all_networks_of_a_config(server):
    config = Config(
        model=ModelConfig("org/tiny", tokenizer="org/tiny@main"),
        reference=ReferenceConfig("smollm2"),
        rewards=(RewardConfig(model="org/tiny"), RewardConfig(ensemble=("org/tiny", "a.gguf"))),
    )
    found = fetch_all(config)
    assert (found.model.path, found.model.tokenizer) == (PINNED, PINNED)
    assert found.reference.path == "smollm2"
    assert [x.model for x in found.rewards] == [PINNED, ""]
    assert found.rewards[1].ensemble == (PINNED, "a.gguf")


def test_a_run_keeps_the_commit_that_it_began_with(server, tmp_path):
    config = runs.sft(tmp_path, steps=1, model=ModelConfig("org/tiny"))
    loop.train(config, MESH)
    assert load(Path(config.output) / "config.yaml").model.path == PINNED
    # The branch moves on; the run that goes on does not.
    server.commit = "f" * 40
    loop.train(replace(config, steps=2), MESH)
    assert load(Path(config.output) / "config.yaml").model.path == PINNED
    assert fetch("org/tiny") == f"org/tiny@{'f' * 40}"
    assert load_model(config.output, MESH)[0].decoder.vocab == 16


def test_export_is_pushed(server, folder, tmp_path, capsys):
    out = tmp_path / "out"
    assert cli.main(["export", str(folder), str(out), "--push", "org/new"]) == 0
    assert server.made[0]["organization"] == "org"
    assert server.made[0]["visibility"] == "private"
    pushed = server.repositories["models", "org/new"]
    assert pushed["model.safetensors"] == (out / "model.safetensors").read_bytes()
    assert f"/org/new/commit/{COMMIT}" in capsys.readouterr().out
    server.refuses = True
    again = tmp_path / "again"
    assert cli.main(["export", str(folder), str(again), "--push", "org/new"]) == 2
    error = capsys.readouterr().err
    assert f"--push org/new: 403 Forbidden: None.: {again} is whole; log in" in error
    assert cli.main(["export", str(folder), str(tmp_path / "no"), "--push", "new"]) == 2
    assert "--push='new': no name of a repository" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()
