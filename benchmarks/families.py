"""How near each family's log-probs are to those of transformers: python benchmarks/families.py.

A small random model of each case of tests/models/test_families.py, float32, with weights so large
that log-probs spread over tens of nats; a table in Markdown on standard output. Of the cases that
are named, if any are, alone.
"""

import sys
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import torch

sys.path.append(str(Path(__file__).parents[1] / "tests/models"))

from test_families import CASES, MASKS, our_logp, theirs, torch_logp

from jaxrlhf.models.hf import read_hf

STD = 0.6


def errors(name: str) -> tuple[float, float]:
    """The spread of transformers' log-probs, and the largest difference of ours, in nats."""
    model = theirs(*CASES[name])
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=STD)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        decoder, params = read_hf(folder)
    found = []
    for mask_BT in MASKS.values():
        expected = torch_logp(model, mask_BT).detach().numpy()
        ours = our_logp(decoder, jax.tree.map(jnp.asarray, params), mask_BT)
        found.append((np.ptp(expected), np.abs(ours - expected).max()))
    return max(x for x, _ in found), max(x for _, x in found)


print("| case | spread, nats | largest difference, nats |\n|---|---|---|")
for name in sys.argv[1:] or CASES:
    spread, error = errors(name)
    print(f"| {name} | {spread:.1f} | {error:.1e} |", flush=True)
