"""The benchmark of ensembles against reward hacking, on a tiny model."""

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import jax
import runs

from jaxrlhf.config import EvalConfig, load
from jaxrlhf.mesh.sharding import make_mesh

PATH = Path(__file__).parents[1] / "benchmarks" / "ensemble.py"
SPEC = importlib.util.spec_from_file_location("ensemble", PATH)
ensemble = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(ensemble)


def test_members_have_rows_of_their_own_and_arms_their_rewards(tmp_path):
    scorer = replace(runs.reward_model(tmp_path), steps=1)
    mesh = make_mesh(scorer.mesh, jax.devices()[:1])
    folders = ensemble.members(scorer, 2, 8, 0, tmp_path / "0", mesh)
    parts = [(tmp_path / "0" / f"pairs-{m}.jsonl").read_text().splitlines() for m in (0, 1)]
    assert [len(part) for part in parts] == [8, 8]
    rows = Path(scorer.data.train).read_text().splitlines()
    assert set(parts[0]) | set(parts[1]) <= set(rows)
    assert [load(Path(folder) / "config.yaml").seed for folder in folders] == [0, 1]
    policy = runs.ppo(tmp_path, steps=1, eval=EvalConfig(gold=(runs.GOODNESS,)))
    policy = replace(policy, data=replace(policy.data, eval=policy.data.train))
    both = ensemble.arms(folders, folders[1])
    assert both["whole"][0].model == folders[1]
    wanted = {name: both[name] for name in ("one-kl-1", "min")}
    results = ensemble.compare(policy, wanted, 3, tmp_path / "3", mesh)
    one, least = (load(tmp_path / "3" / name / "config.yaml") for name in ("one-kl-1", "min"))
    assert (one.rewards[0].model, one.algorithm.kl_coef) == (folders[0], 1.0)
    assert (least.rewards[0].ensemble, least.rewards[0].combine) == (folders, "min")
    summary = json.loads((tmp_path / "3" / "min" / "summary.json").read_text())
    assert results[1]["gold"] == summary["gold_after"]
    assert results[0]["seed"] == one.seed == 3
    assert [result["proxy_before"] for result in results] != [0, 0]


def test_table_takes_means_over_seeds():
    row = {"kl_nats": 1.0, "proxy_before": 0.0, "proxy": 2.0, "best": 0.5}
    results = [
        {"arm": arm, "seed": seed, **row, "gold": gold}
        for seed, golds in enumerate([(0.1, 0.4), (0.3, 0.6)])
        for arm, gold in zip(("one", "min"), golds, strict=True)
    ]
    _, _, one, least = ensemble.table(results).splitlines()
    assert one == "| one | 1.0 | 0.00 → 2.00 | 0.50 | 0.20 | 0.10, 0.30 |"
    assert least.endswith("| 0.50 | 0.40, 0.60 |")
