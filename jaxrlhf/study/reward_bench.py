"""How often a reward model is right about pairs of a file, by subset, as RewardBench counts it.

A row has ``prompt``, ``chosen``, ``rejected`` and perhaps ``subset`` (arXiv:2403.13787). A subset's
accuracy is the share of its pairs whose chosen answer scores higher; a section's the mean of its
subsets', weighted by ``PAIRS``; the score of the whole the mean of the four sections.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from io import StringIO
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from rich.console import Console

from jaxrlhf.config import EvaluateConfig, MeshConfig, RewardConfig, check_evaluate
from jaxrlhf.core import stats
from jaxrlhf.core.errors import InputError
from jaxrlhf.core.files import below
from jaxrlhf.core.remote import check_target, write_text
from jaxrlhf.core.shown import visible
from jaxrlhf.core.types import Rollout
from jaxrlhf.data.batches import held_out_batches
from jaxrlhf.data.chat import ChatSettings, chat_settings
from jaxrlhf.data.formats import Pair, read_pairs
from jaxrlhf.data.rows import Row, Rows, read_rows, transform
from jaxrlhf.data.tokens import Encoded, encode_rows, pad_rows
from jaxrlhf.mesh.processes import is_first
from jaxrlhf.mesh.sharding import fetch, make_mesh, put_rows, row_shards, tpu_slices
from jaxrlhf.models.ends import read_ends
from jaxrlhf.models.hub import fetch_fields
from jaxrlhf.models.load import Loader, is_run, tokenizer_path
from jaxrlhf.models.tokenizer import check_vocab, load_tokenizer
from jaxrlhf.rewards.models import Scorer, load_scorer
from jaxrlhf.run.record import plain
from jaxrlhf.study.figures import mean_text, print_table

FILE = "reward_bench.json"

SECTIONS = {
    "Chat": "alpacaeval-easy alpacaeval-length alpacaeval-hard mt-bench-easy mt-bench-med",
    "Chat Hard": "mt-bench-hard llmbar-natural llmbar-adver-neighbor llmbar-adver-GPTInst "
    "llmbar-adver-GPTOut llmbar-adver-manual",
    "Safety": "refusals-dangerous refusals-offensive xstest-should-refuse xstest-should-respond "
    "donotanswer",
    "Reasoning": "math-prm hep-cpp hep-go hep-java hep-js hep-python hep-rust",
}
"""RewardBench's sections, and the subsets that each is made of."""

PAIRS = {
    **{"alpacaeval-easy": 100, "alpacaeval-length": 95, "alpacaeval-hard": 95},
    **{"mt-bench-easy": 28, "mt-bench-med": 40, "mt-bench-hard": 37},
    **{"llmbar-natural": 100, "llmbar-adver-neighbor": 134, "llmbar-adver-GPTInst": 92},
    **{"llmbar-adver-GPTOut": 47, "llmbar-adver-manual": 46},
    **{"refusals-dangerous": 100, "refusals-offensive": 100, "donotanswer": 136},
    **{"xstest-should-refuse": 250, "xstest-should-respond": 154},
    **{f"hep-{language}": 164 for language in ("cpp", "go", "java", "js", "python", "rust")},
    "math-prm": 984,
}
"""What a subset weighs in its section: its pairs, but mathematics, which has 447, as all code."""

READ = {"model", "data", "rows", "fsdp", "tensor", "context", "raw", "output"}
"""Fields of EvaluateConfig that a reward model is measured by."""


def measure(wish: EvaluateConfig, mesh: Mesh | None = None) -> dict[str, Any]:
    """Score both answers of every pair of ``wish.data``, and write reward_bench.json.

    Args:
      wish: ``model``, the folder of a reward model; ``data``, a file of pairs; ``raw``, score text
        as it is, though the tokenizer has a chat template; ``rows``, answers scored at once on each
        device; ``output``, the folder of the file, if not the run's.
      mesh: where, if not on all devices as ``wish`` says.

    Returns:
      What the file holds: ``accuracy`` of all pairs (a tie counts one half) with ``accuracy_ci``,
      the half width of its 95 % interval; ``subsets`` and ``sections``, the same of each, with
      their ``pairs``; ``score``, the mean of the four sections, where all of their subsets are
      there; ``ece`` and ``reliability`` of σ(r_chosen − r_rejected); ``unknown``, pairs without a
      score of both, which count nowhere; ``score_mean`` and the rest of ``stats.distribution``; and
      ``length_correlation`` with the tokens of the answer.

    Raises:
      InputError: a field that has no meaning here, pairs that cannot be read or are too long, a
        model that scores nothing.
    """
    check_evaluate(wish)
    for field in fields(EvaluateConfig):
        value = getattr(wish, field.name)
        if field.name not in READ and value != field.default:
            raise InputError(
                f"{field.name}={value}: not read where a reward model judges pairs: leave it out"
            )
    if not wish.data:
        raise InputError("data: missing: give a file of pairs: prompt, chosen, rejected, subset")
    wish = fetch_fields(wish, "model")
    if not wish.output and not is_run(wish.model):
        raise InputError(f"output: missing: {wish.model} is no run's folder: give one for {FILE}")
    path = below(wish.output or wish.model, FILE)
    if is_first():
        check_target("output", path)
    axes = {name: getattr(wish, name) or 1 for name in ("fsdp", "tensor", "context")}
    mesh = mesh or make_mesh(MeshConfig(**axes, slices=tpu_slices(jax.devices())))
    with jax.set_mesh(mesh):
        found = {"model": wish.model, "data": wish.data, **_measure(wish, mesh)}
    if is_first():
        text = json.dumps(plain(found), indent=1, allow_nan=False)
        write_text("output", path, text + "\n")
    return found


def _measure(wish: EvaluateConfig, mesh: Mesh) -> dict[str, Any]:
    loader = Loader(mesh)
    config = loader.config_of(wish.model)
    tokenizer = load_tokenizer(tokenizer_path(config.model))
    scorer = load_scorer(RewardConfig(model=wish.model), loader, tokenizer, None, "model")
    decoder = scorer.members[0].network.model.decoder
    check_vocab(tokenizer, decoder)
    pairs = read(wish.data, tokenizer, chat_settings(config.data), wish.raw)
    ends = read_ends(wish.model, tokenizer, decoder.vocab)
    more = {"stop": ends.stop, "strings": ends.strings}
    encoded = encode_rows(pairs, tokenizer, decoder.vocab, decoder.context, **more)
    score_N2 = score_pairs(scorer, encoded, ends.pad, wish.rows, mesh)
    subsets = [str(row.source.columns.get("subset", "")) for row in encoded.items]
    lengths = [[len(answer) for answer in row.answers] for row in encoded.items]
    return figures(score_N2, subsets, np.array(lengths))


def read(path: str, tokenizer: Any, settings: ChatSettings, raw: bool) -> Rows[Pair]:
    """The pairs of a file; text is what a user says, where there is a template and not ``raw``."""
    rows = read_rows(path)
    if not raw and (settings.template or tokenizer.chat_template):
        rows = transform(rows, _as_messages)
    return read_pairs(rows, tokenizer, chat=settings)


def _as_messages(row: Row) -> Row:
    """A row of text as a chat: what a user says, and two answers to it."""
    names = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
    if not all(isinstance(row.values.get(name), str) for name in names):
        return row
    chats = {name: [{"role": role, "content": row.values[name]}] for name, role in names.items()}
    return replace(row, values={**row.values, **chats})


def score_pairs(
    scorer: Scorer, rows: Rows[Encoded], pad: int, at_once: int, mesh: Mesh
) -> np.ndarray:
    """Scores of both answers of each pair, float64 [N, 2], reward units; NaN where there is none.

    Args:
      at_once: answers scored at once on each device.
    """
    answers = [(row.prompt, answer) for row in rows.items for answer in row.answers]
    width = max(len(prompt) + len(answer) for prompt, answer in answers)
    score_R = np.full(len(answers), np.nan)
    shards = row_shards()
    for row_B, real_B in held_out_batches(len(answers), at_once * shards, shards):
        some = [answers[row] for row in row_B]
        texts, where = [prompt + answer for prompt, answer in some], [""] * len(some)
        token_BT, real_BT = pad_rows(texts, width, pad, where)
        starts_B = np.array([len(prompt) for prompt, _ in some])
        mask_BT = (real_BT * (np.arange(width) >= starts_B[:, None])).astype(np.float32)
        nothing_BT, ended_B = np.zeros(token_BT.shape, np.float32), np.ones(len(some), bool)
        arrays = token_BT, real_BT, mask_BT, nothing_BT, nothing_BT, ended_B
        score_B = fetch(scorer(Rollout(*put_rows(arrays, mesh))))
        score_R[row_B[real_B]] = np.asarray(score_B, np.float64)[real_B]
    return score_R.reshape(-1, 2)


def figures(score_N2: np.ndarray, subsets: Sequence[str], length_N2: np.ndarray) -> dict[str, Any]:
    """What is found of scores; see ``measure``.

    Args:
      score_N2: [N, 2], chosen and rejected, reward units; not finite where there is none.
      subsets: N names.
      length_N2: [N, 2], tokens of the answers.

    Raises:
      InputError: no pair has both scores.
    """
    known_N = np.isfinite(score_N2).all(1)
    if not known_N.any():
        raise InputError(f"no score of both answers of any of {len(score_N2)} pairs")
    score_N2, length_N2 = score_N2[known_N], length_N2[known_N]
    difference_N = score_N2[:, 0] - score_N2[:, 1]
    right_N = (1 + np.sign(difference_N)) / 2
    subset_N = np.array(subsets)[known_N]
    by_subset = {
        name: _share(right_N[subset_N == name]) for name in dict.fromkeys(subset_N) if name
    }
    curve = stats.pair_reliability(difference_N)
    found = {
        **_share(right_N),
        "unknown": int((~known_N).sum()),
        "subsets": by_subset,
        "sections": sections(by_subset),
        "ece": curve.ece,
        "reliability": {name: getattr(curve, name) for name in ("predicted", "observed", "count")},
        **stats.distribution(score_N2.ravel()),
        "length_correlation": stats.correlation(score_N2.ravel(), length_N2.ravel()),
    }
    if set(PAIRS) <= set(by_subset):
        found["score"] = float(np.mean([x["accuracy"] for x in found["sections"].values()]))
    return found


def _share(right_N: np.ndarray) -> dict[str, Any]:
    accuracy, ci = stats.share_interval(right_N)
    return {"accuracy": accuracy, "accuracy_ci": ci, "pairs": len(right_N)}


def sections(by_subset: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """The accuracy of each of RewardBench's sections that has a subset here, over those it has.

    A section's interval takes its subsets' errors for independent: √Σ (w·ci)², Σ w = 1.
    """
    found = {}
    for section, names in SECTIONS.items():
        own = [name for name in names.split() if name in by_subset]
        if not own:
            continue
        weight_S = np.array([PAIRS[name] for name in own], float)
        weight_S /= weight_S.sum()
        accuracy_S, ci_S = (
            np.array([by_subset[name][key] for name in own]) for key in ("accuracy", "accuracy_ci")
        )
        found[section] = {
            "accuracy": float(weight_S @ accuracy_S),
            "accuracy_ci": float(np.sqrt(((weight_S * ci_S) ** 2).sum())),
            "pairs": sum(by_subset[name]["pairs"] for name in own),
        }
    return found


def table(found: Mapping[str, Any], width: int = 100) -> str:
    """What ``measure`` has found, for a terminal of ``width`` columns."""
    out = StringIO()
    console = Console(file=out, width=width, color_system=None)
    groups = {"all": found, **found["sections"], **found["subsets"]}
    rows = [
        (name, mean_text(group, "accuracy"), str(group["pairs"])) for name, group in groups.items()
    ]
    title = f"{found['model']} on {found['pairs']} pairs of {found['data']}"
    print_table(console, title, ("", "right (ties one half)", "pairs"), rows)
    curve = found["reliability"]
    columns = zip(curve["predicted"], curve["observed"], curve["count"], strict=True)
    rows = [(f"{p:.2f}", f"{o:.2f}", str(count)) for p, o, count in columns]
    title = f"Calibration: expected error {found['ece']:.3f}"
    print_table(console, title, ("said", "right", "pairs"), rows)
    said = f"Correlation of score and length: {found['length_correlation']:.2f}."
    if found["unknown"]:
        said += f" {found['unknown']} pairs without a score of both answers are left out."
    if "score" in found:
        said += f" RewardBench score, the mean of the sections: {found['score']:.3f}."
    console.print(visible(said))
    return out.getvalue()
