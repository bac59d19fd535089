"""The curves of the pages on algorithms: reward and KL of each, on the table of docs/oracle.md.

    python benchmarks/curves.py

trains every algorithm of a page on the same four prompts with 40 responses each, whose rewards are
known, and writes docs/curves/PAGE.svg. Reward and KL are exact sums over the responses, not
estimates; the dashed lines are those of the optimum in closed form. Half a minute on one core.
"""

import argparse
from collections.abc import Mapping
from dataclasses import replace
from html import escape
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxrlhf.algorithms import ALGORITHMS
from jaxrlhf.config import (
    A2CConfig,
    CISPOConfig,
    DAPOConfig,
    DPOConfig,
    DrGRPOConfig,
    GRPOConfig,
    GSPOConfig,
    OnPolicyConfig,
    PPOConfig,
    ReinforceConfig,
    ReinforcePPConfig,
    ReMaxConfig,
    RLOOConfig,
)
from jaxrlhf.run.charts import Scale, spread, ticks
from jaxrlhf.study.oracle import Problem, Settings, learn, learn_pairs, log_policy, make_problem

ROOT = Path(__file__).parents[1]
PAGES: dict[str, tuple[OnPolicyConfig | DPOConfig, ...]] = {
    "ppo": (PPOConfig(), A2CConfig()),
    "reinforce": (ReinforceConfig(), RLOOConfig(), ReMaxConfig(), ReinforcePPConfig()),
    "grpo": (
        GRPOConfig(),
        DrGRPOConfig(kl_in="reward"),
        DAPOConfig(kl_in="reward"),
        GSPOConfig(kl_in="reward"),
        CISPOConfig(kl_in="reward"),
    ),
    "dpo": (DPOConfig(), DPOConfig(kind="ipo"), DPOConfig(kind="hinge")),
}
"""Those of each page: all that sample, and of those that learn from pairs the kinds of dpo."""

BETA = 0.5
"""β, reward units a nat."""

SETTINGS = Settings(iterations=300, samples=32)
POINTS = 60
"""Of a curve; the last iteration is one of them."""

COLOURS = ("#3b6fb6", "#c05a1e", "#3a8a4d", "#8a4fa3", "#a08000")
WIDTH, HEIGHT, LEFT, TOP, BOTTOM = 360, 240, 44, 26, 52


class Curve(NamedTuple):
    """An algorithm's way: E[r] and KL(π‖π_ref) before each iteration and after the last."""

    reward_I: np.ndarray
    kl_I: np.ndarray


def name_of(config: OnPolicyConfig | DPOConfig) -> str:
    """What the legend calls it."""
    kind = getattr(config, "kind", "sigmoid")
    return config.name if kind == "sigmoid" else f"{config.name}, {kind}"


def train(config: OnPolicyConfig | DPOConfig, problem: Problem, settings: Settings) -> Curve:
    """From the reference, on samples; or on all pairs, each as likely as it is to be drawn."""
    if isinstance(config, DPOConfig):
        algorithm = ALGORITHMS[config.name](replace(config, beta=BETA))
        found = jax.jit(learn_pairs, static_argnums=(0, 2))(algorithm, problem, settings)
    else:
        algorithm = ALGORITHMS[config.name](replace(config, kl_coef=BETA))
        key = jax.random.key(1)
        found = jax.jit(learn, static_argnums=(0, 3))(algorithm, problem, key, settings)
    return Curve(np.asarray(found.reward_I), np.asarray(found.ref_kl_I))


def optimum(problem: Problem) -> tuple[float, float]:
    """E[r] and KL(π*‖π_ref) of the closed form."""
    best_QY, _ = problem.optimum()
    chance_QY = jnp.exp(best_QY)
    kl = (chance_QY * (best_QY - log_policy(problem.ref, problem.space))).sum(1).mean()
    return float((chance_QY * problem.reward_QY).sum(1).mean()), float(kl)


def drawing(curves: Mapping[str, Curve], best: tuple[float, float]) -> str:
    """Both panels and the legend, as a file of SVG that is read in light and in dark."""
    style = (
        "text{font:11px sans-serif;fill:#555}.g{stroke:#8884}polyline{fill:none;stroke-width:1.5}"
        "@media(prefers-color-scheme:dark){text{fill:#bbb}}"
    )
    panels = (
        _panel("E[r], exact", {name: c.reward_I for name, c in curves.items()}, best[0], 0),
        _panel("KL(π‖π_ref), nats", {name: c.kl_I for name, c in curves.items()}, best[1], WIDTH),
    )
    key, x = [], LEFT
    for number, name in enumerate(curves):
        key.append(
            f'<rect x="{x}" y="{HEIGHT - 12}" width="10" height="3" fill="{_colour(number)}"/>'
        )
        key.append(f'<text x="{x + 14}" y="{HEIGHT - 7}">{escape(name)}</text>')
        x += 30 + 7 * len(name)
    key.append(f'<text x="{x}" y="{HEIGHT - 7}">- - π*</text>')
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {2 * WIDTH} {HEIGHT}">'
    return "\n".join([head, f"<style>{style}</style>", *panels, *key, "</svg>"]) + "\n"


def _panel(title: str, curves: Mapping[str, np.ndarray], best: float, shift: int) -> str:
    values = [float(x) for curve in curves.values() for x in curve]
    last = len(next(iter(curves.values()))) - 1
    across = Scale(0, last, LEFT, WIDTH - 14)
    up = Scale(*spread([*values, best], 0.06), HEIGHT - BOTTOM, TOP)
    parts = [f'<g transform="translate({shift},0)"><text x="{LEFT}" y="14">{escape(title)}</text>']
    for label in ticks(up.low, up.high):
        y = up.at(float(label))
        parts.append(f'<line class="g" x1="{LEFT}" x2="{WIDTH - 14}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4}" text-anchor="end">{label}</text>')
    for label in ticks(0, last, 5):
        x = across.at(float(label))
        parts.append(
            f'<text x="{x}" y="{HEIGHT - BOTTOM + 15}" text-anchor="middle">{label}</text>'
        )
    middle = (LEFT + WIDTH) / 2
    parts.append(f'<text x="{middle}" y="{HEIGHT - 22}" text-anchor="middle">iteration</text>')
    y = up.at(best)
    parts.append(
        f'<line x1="{LEFT}" x2="{WIDTH - 14}" y1="{y}" y2="{y}" stroke="#888" '
        'stroke-dasharray="4 3"/>'
    )
    at = np.unique(np.linspace(0, last, POINTS).round().astype(int))
    for number, curve in enumerate(curves.values()):
        points = " ".join(f"{across.at(int(i))},{up.at(float(curve[i]))}" for i in at)
        parts.append(f'<polyline stroke="{_colour(number)}" points="{points}"/>')
    return "\n".join([*parts, "</g>"])


def _colour(number: int) -> str:
    return COLOURS[number % len(COLOURS)]


def write(page: str, folder: Path, settings: Settings = SETTINGS) -> dict[str, Curve]:
    """Train the algorithms of a page and write its drawing; the curves by their names."""
    problem = make_problem(jax.random.key(0), BETA)
    curves = {name_of(config): train(config, problem, settings) for config in PAGES[page]}
    folder.mkdir(parents=True, exist_ok=True)
    text = drawing(curves, optimum(problem))
    (folder / f"{page}.svg").write_text(text, encoding="utf-8")
    return curves


def main() -> None:
    """Write the drawings of all pages, or of those that are named."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("page", nargs="*", default=[*PAGES], help=", ".join(PAGES))
    given = parser.parse_args()
    for page in given.page:
        for name, curve in write(page, ROOT / "docs/curves").items():
            ends = f"E[r] {curve.reward_I[0]:.3f} → {curve.reward_I[-1]:.3f}"
            print(f"{page:<10} {name:<14} {ends}, KL {curve.kl_I[-1]:.3f} nats")


if __name__ == "__main__":
    main()
