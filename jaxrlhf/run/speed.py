"""How fast an iteration was, and what share of the machine's best that is.

Each figure is of work that the model needs, over the seconds that a phase took: padding, remat and
copies cost seconds and count as nothing. The counts come from the rollouts and batches as they are;
nothing waits for them.
"""

import functools
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxrlhf.config import DecoderConfig, MeshConfig, is_on_policy, is_reward_model
from jaxrlhf.core.types import AnyBatch, Array, PreferenceBatch, Rollout
from jaxrlhf.mesh.chips import CHIPS, name_of
from jaxrlhf.mesh.sharding import DECODE, make_mesh, row_shards
from jaxrlhf.models.cache import Kind
from jaxrlhf.models.decode import kind_of
from jaxrlhf.models.quantise import BYTES
from jaxrlhf.models.rope import layers_of
from jaxrlhf.models.stacks import stacks
from jaxrlhf.models.transformer import Model
from jaxrlhf.run.setup import Run
from jaxrlhf.steps.slots import decode_steps

TIMED = ("seconds", "tokens_per_second", "mfu", "bandwidth_share", "sample_share", "recompiles")
"""Metrics that two runs of the same config need not share: they are of the machine."""


class Ceiling(NamedTuple):
    """What all devices of a mesh can do together."""

    flops: float
    """FLOP/s."""
    bandwidth: float
    """Bytes/s read from memory."""


def ceiling(mesh: Mesh) -> Ceiling | None:
    """The best that a mesh can do; None where nothing is known of its devices.

    The published peak of each device, dense bfloat16 (``mesh.chips``). Of CPUs, what this machine
    does now, times the processes: fake devices share its cores.
    """
    device = mesh.devices.flat[0]
    if device.platform == "cpu":
        return Ceiling(*(jax.process_count() * x for x in measured()))
    name = name_of(device.device_kind)
    if name is None:
        return None
    return Ceiling(mesh.size * CHIPS[name].flops, mesh.size * CHIPS[name].bandwidth)


@functools.cache
def measured() -> Ceiling:
    """The best of a few float32 products of [1024, 1024], and of a few sums over 64 MiB.

    Takes about 0.2 s, once a process. Other work on the machine makes it too low.
    """
    # The run's mesh may have devices that this process has not.
    with jax.set_mesh(make_mesh(MeshConfig(), jax.local_devices()[:1])):
        x, y = jnp.ones((1024, 1024)), jnp.ones((16, 2**20))
        product = _quickest(jax.jit(lambda x: x @ x), x)
        seen = _quickest(jax.jit(lambda y: y.sum(1)), y)
    return Ceiling(2 * 1024**3 / product, y.nbytes / seen)


def _quickest(call: Callable[[Array], Array], given: Array, tries: int = 4) -> float:
    call(given).block_until_ready()
    seconds = []
    for _ in range(tries):
        began = time.perf_counter()
        call(given).block_until_ready()
        seconds.append(time.perf_counter() - began)
    return min(seconds)


def matrices(decoder: DecoderConfig, vocab: bool = True) -> int:
    """N: the weights that every token is multiplied with.

    Of a layer D·H·(2N + 2K) + 3·D·F, D·H·(2N + K) where keys are values, 2·D·H·N where they are
    another layer's, 2·D·F where the MLP has no gate, 3·D·P of ``layer_embed``; and D·V of the
    projection on the vocabulary, if it is asked for. Of a mixture of experts a token's are counted,
    and the router's. The embedding is looked up, norms and biases are vectors: neither counts.
    """
    c = decoder
    others = c.layers * c.layer_embed + vocab * c.vocab
    return sum(_layers(stack.decoder) for stack in stacks(c)) + c.embed * others


def _layers(c: DecoderConfig) -> int:
    """Of layers of one shape."""
    mlp = (2 + c.gated) * c.mlp
    if c.moe is not None:
        mlp = c.moe.experts + c.moe.per_token * mlp + (2 + c.gated) * c.moe.beside
    keys = 0 if c.shared_kv_layers else c.kv_heads * (1 if c.keys_are_values else 2)
    layer = c.head_dim * (2 * c.heads + keys) + mlp + 2 * c.layer_embed
    return c.layers * c.embed * layer


def adapters(model: Model) -> int:
    """The weights of a model's adapters; 0 without."""
    if model.lora is None:
        return 0
    return sum(int(np.prod(x.shape)) for x in jax.tree.leaves(model.lora_shapes()))


def forward_flops(model: Model, length: float, vocab: bool = True) -> float:
    """FLOPs of a token's forward pass: 2·N + 4·L·(heads·H)·T (PaLM, arXiv:2204.02311, B).

    Args:
      length: T, tokens of a row, mean; the mask is counted as if it hid nothing, as is usual. Of a
        layer with a window it is no more than that.
      vocab: whether the token is projected on the vocabulary.
    """
    c = model.decoder
    seen = sum(min(kind.window or length, length) * kind.head_dim for kind in layers_of(c))
    attention = 4 * c.heads * seen
    return 2 * (matrices(c, vocab) + adapters(model)) + attention


def train_flops(model: Model, length: float, vocab: bool = True) -> float:
    """FLOPs of a token's forward and backward pass: 6·N + 12·L·(heads·H)·T, as ``forward_flops``.

    Under adapters the weights themselves have no gradient: 4·N + 6·(adapters) + 12·….
    """
    frozen = matrices(model.decoder, vocab) if model.lora is not None else 0
    return 3 * forward_flops(model, length, vocab) - 2 * frozen


@functools.partial(jax.jit, static_argnums=1)
def decoded(rollout: Rollout, slots: int = 0) -> dict[str, Array]:
    """What a decode loop had to do, by the masks of what it made; scalars.

    A response of n_b tokens takes n_b − 1 steps, its first token is drawn from the prompt.
    ``tokens`` Σ_b (n_b − 1); ``steps`` of the loop; ``row_steps``, rows at once times these;
    ``slots`` Σ_b (n_b − 1)·(p_b + n_b/2), keys that its tokens look back at, prompts of p_b tokens.

    Args:
      slots: ``SampleConfig.slots``.
    """
    n_B = rollout.mask_BT.sum(1)
    p_B = rollout.attention_mask_BT.sum(1) - n_B
    steps = decode_steps(n_B, slots, row_shards(DECODE))
    return {
        "tokens": (n_B - 1).sum(),
        "steps": steps,
        "row_steps": (slots if 0 < slots < n_B.size else n_B.size) * steps,
        "slots": ((n_B - 1) * (p_B + n_B / 2)).sum(),
    }


def decode_bytes(
    model: Model, mesh: Mesh, kind: Kind, steps: float, slots: float, base: str | None = None
) -> float:
    """Bytes that decoding has to read: all weights a step, on each shard of the rows; and for each
    token the keys and values of those before it, in ``kind``: int8 has a float32 scale each.

    Args:
      base: what those of the layers are kept in under adapters, if not in the model's dtype.
    """
    c, size = model.decoder, jnp.dtype(model.dtype).itemsize
    copies = mesh.size / dict(mesh.shape).get("tensor", 1)
    layers = matrices(c, vocab=False)
    others = matrices(c) - layers + adapters(model)
    weights = copies * (layers * BYTES.get(base or "", size) + others * size)
    each = [
        x.kv_heads * (x.head_dim * jnp.dtype(kind).itemsize + 4 * (kind == "int8"))
        for x in layers_of(c)
    ]
    return steps * weights + slots * 2 * sum(each)


def read(batch: AnyBatch) -> dict[str, Any]:
    """``tokens`` of a batch that are no padding, and ``texts``, the rows that have any; of numpy's
    arrays as of jax's. Rows packed in one count each."""
    is_pairs = isinstance(batch, PreferenceBatch)
    mask = batch.attention_mask_BCT if is_pairs else batch.attention_mask_BT
    segment_BT = getattr(batch, "segment_BT", None)
    texts = mask.any(-1).sum() if segment_BT is None else segment_BT.max(1).sum()
    return {"tokens": mask.sum(), "texts": texts}


_read_on_device = jax.jit(read)


class Compilations:
    """Counts the programs that a thread waited for, compiled or read back from the cache."""

    def __init__(self):
        self.count: dict[int, int] = {}
        self.seconds = 0.0
        jax.monitoring.register_event_duration_secs_listener(self._heard)

    def _heard(self, event: str, duration_secs: float, **_: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            self.seconds += duration_secs
            thread = threading.get_ident()
            self.count[thread] = self.count.get(thread, 0) + 1

    def here(self) -> int:
        """Those of the thread that asks, so far."""
        return self.count.get(threading.get_ident(), 0)

    def total(self) -> tuple[int, float]:
        """Those of all threads, and the seconds that they took, so far."""
        return sum(self.count.copy().values()), self.seconds


@functools.cache
def compilations() -> Compilations:
    """The one listener of this process."""
    return Compilations()


class Meter:
    """Counts what an iteration does, and says how fast that was.

    Args:
      run: what is done.
    """

    def __init__(self, run: Run):
        self._run = run
        self._first = True
        self.begin({})

    def note(self) -> str:
        """What is to be said once; "" where every figure can be had."""
        device = self._run.mesh.devices.flat[0]
        if device.platform == "cpu" or name_of(device.device_kind) is not None:
            return ""
        return f"no mfu, no bandwidth_share: the speed of {device.device_kind!r} is not known"

    def begin(self, seconds: Mapping[str, float]) -> None:
        """An iteration begins; ``seconds`` are those of all phases so far."""
        self._before = dict(seconds)
        self._compiled = compilations().here()
        self._decoded: list[dict[str, Array]] = []
        self._read: dict[str, Any] = {}

    def sampled(self, *rollouts: Rollout | None) -> None:
        """A round of sampling has made these."""
        slots = self._run.config.sample.slots
        self._decoded += [decoded(rollout, slots) for rollout in rollouts if rollout is not None]

    def learns(self, batch: Any) -> None:
        """The update reads this batch, whole, in each epoch."""
        on_device = isinstance(jax.tree.leaves(batch)[0], jax.Array)
        self._read = _read_on_device(batch) if on_device else read(batch)

    def metrics(
        self, seconds: Mapping[str, float], spent: float, passes: float = 1.0, warming: bool = False
    ) -> dict[str, float]:
        """The iteration's figures.

        ``mfu``: FLOPs of the update over its seconds, a share of the ceiling. ``bandwidth_share``:
        bytes that decoding has to read over the seconds of sampling, likewise. ``sample_share``:
        sampling's part of the phases' seconds. ``idle_share``: 1 − Σ_b (n_b − 1) / (rows·steps),
        steps of rows that had ended, of the rows at once. ``recompiles``: programs that it waited
        for to be compiled, left out of a launch's first iteration, which compiles them all. Of rows
        from a file, ``tokens_per_second``: tokens of the batch, prompts included, a second.

        Args:
          seconds: of all phases so far.
          spent: seconds of the iteration.
          passes: how often the update has read the batch.
          warming: only the critic learns.
        """
        phase = {name: x - self._before.get(name, 0.0) for name, x in seconds.items()}
        best = ceiling(self._run.mesh)
        out: dict[str, float] = {}
        loops, batch = jax.device_get((self._decoded, self._read))
        tokens, texts = (float(batch[name]) for name in ("tokens", "texts"))
        if best is not None:
            flops = passes * tokens * self._flops_a_token(tokens / max(texts, 1), warming)
            out["mfu"] = flops / phase["update"] / best.flops
        if loops:
            out["sample_share"] = phase["sample"] / sum(phase.values())
        if loops:
            total = {name: float(sum(loop[name] for loop in loops)) for name in loops[0]}
            if best is not None:
                model, kind = self._run.model, kind_of(self._run.model, self._run.config.sample)
                base = self._run.config.model.frozen_dtype if model.lora else None
                done = total["steps"], total["slots"]
                needed = decode_bytes(model, self._run.mesh, kind, *done, base)
                out["bandwidth_share"] = needed / phase["sample"] / best.bandwidth
            done = total["row_steps"]
            out["idle_share"] = 1 - total["tokens"] / done if done else 0.0
        if not loops:
            out["tokens_per_second"] = tokens / spent
        if not self._first:
            out["recompiles"] = compilations().here() - self._compiled
        self._first = False
        return out

    def _flops_a_token(self, length: float, warming: bool) -> float:
        """Of one pass of the update over a token of rows of this mean length."""
        run = self._run
        if not is_on_policy(run.config):
            vocab = not is_reward_model(run.config)
            # The reference's log-probs are part of the step.
            compared = 0.0
            if run.reference is not None:
                compared = forward_flops(run.reference.model, length)
            return train_flops(run.model, length, vocab) + compared
        policy = train_flops(run.model, length)
        if "teacher" in run.algorithm.needs:  # it reads the batch in the update
            assert run.reference is not None
            policy += forward_flops(run.reference.model, length)
        if "critic" not in run.states:
            # A shared head is warmed up on a trunk that stays as it is.
            return forward_flops(run.model, length, vocab=False) if warming else policy
        assert run.critic is not None
        return train_flops(run.critic, length, vocab=False) + (0.0 if warming else policy)
