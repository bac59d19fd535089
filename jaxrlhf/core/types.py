"""What flows between the steps: arrays, and the key to their axes.

Array names carry their axes as a suffix, one letter an axis, in order:

    Q  prompts                      T  tokens of a row (prompt and response)
    G  samples a prompt             P  prompt tokens (left-padded)
    B  rows = Q·G, prompt-major:    D  embed          V  vocabulary
       row = q·G + g                N  query heads    L  layers
    K  key/value heads              H  head_dim       F  mlp
    S  slots of the KV cache        C  candidate responses of one prompt (2 for a pair)
    E  experts                      M  experts that a token takes, of all layers, layer by layer

All log-probs are in nats, float32. Masks are float32 or bool with 1 for "counts".

Alignment, everywhere: column t of a per-token array speaks of the *action* that wrote token t.
``logp_BT[:, t] = log π(token t | tokens < t)`` and ``value_BT[:, t] = V(tokens < t)``, both 0 in
column 0 and wherever the attention mask is 0 at t or t−1.
"""

from typing import Any

import jax
import numpy as np
from flax import struct

Array = jax.Array
Params = Any
"""A nested dict of arrays."""


@struct.dataclass
class Rollout:
    """Prompts and the responses that the policy sampled for them.

    T = P + max_new_tokens; the prompt is left-padded to P, the response starts in column P.
    """

    token_BT: Array
    """int32. Prompt, response up to and including its stop token, then padding."""
    attention_mask_BT: Array
    """int32, 1 on real tokens of prompt and response."""
    mask_BT: Array
    """float32, 1 on the response's tokens, stop token included; from the sampler's own stop
    position, never from ``token != pad``."""
    logp_BT: Array
    """log π of each token, full vocabulary, at the sampling temperature; 0 where mask is 0."""
    sample_logp_BT: Array
    """log-prob under the distribution that was drawn from (after top-k, top-p, min-p);
    equal to ``logp_BT`` bit for bit when nothing is truncated or forbidden."""
    ended_B: Array
    """bool, True where the response ended with a stop token, False where it was cut off."""
    value_BT: Array | None = None
    """V(tokens < t) where the critic shares the policy's trunk, else None."""
    expert_BTM: Array | None = None
    """With router replay, the experts that each token took when it was read, uint8 or uint16;
    their number where it never was; see models.replay."""
    n: int = struct.field(pytree_node=False, default=1)
    """G, samples a prompt; static."""


@struct.dataclass
class StopTable:
    """Strings that end a response, as an automaton over tokens (models.stop_strings).

    From state s, token v leads to ``next_SC[s, class_V[v]]``; 0 is the start, and the last state
    that of a complete string.
    """

    class_V: Array | np.ndarray
    """int32 [V], which of C kinds a token is: those of a kind do the same to every state."""
    next_SC: Array | np.ndarray
    """int32 [S, C]; S states."""


@struct.dataclass
class Batch:
    """What one policy update reads: a rollout with its targets. Rows may be sliced and permuted."""

    token_BT: Array
    attention_mask_BT: Array
    mask_BT: Array
    """float32, 1 on the tokens that learn: response tokens of rows whose reward is known."""
    old_logp_BT: Array
    """log-probs under the policy that sampled: the denominator of the ratio."""
    advantage_BT: Array
    weight_BT: Array
    """Σ weight·x over the minibatch is the mean that the config asks for (masked.weights)."""
    return_BT: Array | None = None
    old_value_BT: Array | None = None
    ref_logp_BT: Array | None = None
    """log-probs under the reference, where the KL to it is in the loss."""
    kl_coef_B: Array | None = None
    """β of that term, the same in every row."""
    expert_BTM: Array | None = None
    """As the rollout's: those that tokens are to take in the update."""


@struct.dataclass
class PreferenceBatch:
    """C candidate responses to each prompt; candidate 0 of a pair is the chosen one."""

    token_BCT: Array
    """int32 [B, C, T]."""
    attention_mask_BCT: Array
    margin_B: Array
    """Wanted score difference, in reward units; 0 unless the data says otherwise."""
    weight_B: Array
    """float32; 1/B on real rows, 0 on rows that only fill the batch, so that sums are means."""
    mask_BCT: Array | None = None
    """float32, 1 on the answers' tokens, stop tokens included; for losses on log-probs."""
    ref_logp_BCT: Array | None = None
    """log-probs under the reference, nats, for losses that are relative to one."""
    label_B: Array | None = None
    """float32, 1 where candidate 0 is desirable, 0 where not; for single labelled answers, whose
    candidate 1 is the answer to another prompt. For scored answers, the score."""
    rank_BC: Array | None = None
    """float32, 1 is best, equal ranks are a tie; for rankings."""
    candidate_mask_BC: Array | None = None
    """float32, 1 on a ranking's responses, 0 on what only fills a row that has fewer."""
    step_mask_BCT: Array | None = None
    """float32, 1 at the last token of every step; for process rewards."""
    label_BCT: Array | None = None
    """float32, there the probability that the step is right."""


@struct.dataclass
class TokenBatch:
    """Rows to imitate (SFT), or on which to imitate a teacher (GKD)."""

    token_BT: Array
    attention_mask_BT: Array
    weight_BT: Array
    """Σ weight·x is the mean over the tokens that are trained on; 0 on prompt and padding."""
    segment_BT: Array | None = None
    """int32; of rows that are several rows one after the other, which one (from 1; 0 on padding):
    tokens see those of their own segment, and positions start anew in each."""


AnyBatch = Batch | PreferenceBatch | TokenBatch


@struct.dataclass
class RouterSums:
    """What the routers of a mixture of experts have said of real tokens, added up over them."""

    chosen_LE: Array
    """float32, tokens that take an expert, of each layer."""
    chance_LE: Array
    """The experts' probabilities."""
    square_L: Array
    """(log Σ exp of a router's logits)²."""
    entropy_L: Array
    """Nats, of the probabilities."""
    tokens: Array
    """float32, how many they are."""


@struct.dataclass
class Outputs:
    """What one forward pass yields; see ``forward``."""

    logp_BT: Array
    entropy_BT: Array | None = None
    """Entropy, in nats, of the distribution that token t was drawn from."""
    value_BT: Array | None = None
    divergence_BT: Array | None = None
    """How far the distribution that token t is drawn from is from a teacher's, nats."""
    routers: RouterSums | None = None
    """Of a mixture, where they are asked for."""


@struct.dataclass
class TrainState:
    """All that training one set of parameters carries from step to step: arrays only."""

    params: Params
    opt_state: Any
    step: Array
    """int32, optimizer steps taken."""
    skipped: Array
    """int32, updates skipped in a row because a gradient was not finite; 0 after a good one."""

    @classmethod
    def create(cls, params: Params, tx: Any) -> "TrainState":
        """A fresh state for ``params`` under the optax transformation ``tx``.

        What is trained is float32: parameters in bfloat16, as files have them, are widened.
        """
        narrow, wide = jax.numpy.bfloat16, jax.numpy.float32
        params = jax.tree.map(lambda x: x.astype(wide) if x.dtype == narrow else x, params)
        # Two arrays, not one twice: a buffer cannot be donated twice.
        step, skipped = (jax.numpy.zeros((), jax.numpy.int32) for _ in range(2))
        return cls(params=params, opt_state=tx.init(params), step=step, skipped=skipped)


States = dict[str, TrainState]
"""What is trained: ``policy``, and ``critic`` if it is a network of its own; with early stopping,
``best`` beside them."""
