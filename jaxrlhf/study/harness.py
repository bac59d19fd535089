"""Our models as lm-evaluation-harness asks for one; importing this needs the extra ``lm-eval``.

    import lm_eval
    from jaxrlhf.study.harness import JaxLM

    lm_eval.simple_evaluate(model=JaxLM("runs/sft"), tasks=["hellaswag"])

or its own command line, with ``--model jaxrlhf`` given:

    python -m jaxrlhf.study.harness run --model_args path=runs/sft,batch_size=32 --tasks hellaswag
"""

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxrlhf.config import MeshConfig, SampleConfig, check_sample
from jaxrlhf.core.errors import InputError, to_install
from jaxrlhf.core.types import Array, Params, Rollout
from jaxrlhf.data.text import decode_rollout
from jaxrlhf.data.tokens import pad_rows
from jaxrlhf.mesh.sharding import fetch, make_mesh, put_rows, row_shards
from jaxrlhf.models.ends import read_ends
from jaxrlhf.models.load import load_model, scores_texts
from jaxrlhf.models.stop_strings import stop_table
from jaxrlhf.models.transformer import Model
from jaxrlhf.steps.logp import token_logp
from jaxrlhf.steps.sample import sample

try:
    from lm_eval.__main__ import cli_evaluate  # pyright: ignore[reportMissingImports]
    from lm_eval.api.model import TemplateLM  # pyright: ignore[reportMissingImports]
    from lm_eval.api.registry import register_model  # pyright: ignore[reportMissingImports]
    from lm_eval.models.utils import (  # pyright: ignore[reportMissingImports]
        normalize_gen_kwargs,
        postprocess_generated_text,
    )
    from lm_eval.utils import (  # pyright: ignore[reportMissingImports]
        get_rolling_token_windows,
        make_disjoint_window,
    )
except ImportError as error:
    raise InputError(f"lm-eval is not installed: {to_install('lm-eval')}") from error

NARROWEST = 32
"""Tokens that rows are padded to at least; wider ones to the next power of two. Each width is a
program to compile."""

COLUMNS = 16
"""Columns whose logits exist at once where the likeliest token is sought."""

SAMPLER = {"temperature": float, "top_k": int, "top_p": float, "min_p": float}
"""What a task may ask of the sampler beside greedy decoding."""


@register_model("jaxrlhf")
class JaxLM(TemplateLM):
    """A model as the harness's ``TemplateLM``: our tokens, our log-probs, our sampler.

    Texts become tokens, long ones windows, and contexts are cut on the left, as the harness's own
    ``hf`` model does: of one folder both say the same (within 1e-4 nats in float32).
    """

    def __init__(
        self,
        path: str,
        batch_size: int | str = 16,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        seed: int = 0,
        mesh: Mesh | None = None,
    ):
        """Load a model.

        Args:
          path: smollm2, a Hugging Face folder, a .gguf file, or the output folder of a run.
          batch_size: rows at once on each device.
          max_length: most tokens of a row; None: the model's context.
          max_gen_toks: most tokens of an answer whose task does not say.
          seed: of the draws of tasks that sample.
          mesh: where it lies (default: all devices along ``data``).

        Raises:
          InputError: a reward model, or no model; a number that cannot be.
        """
        super().__init__()
        if scores_texts(path):
            raise InputError(f"path={path}: a reward model, which says nothing: see jaxrlhf eval")
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise InputError(f"batch_size={batch_size}: must be a whole number of at least 1")
        self.path, self.mesh = path, mesh or make_mesh(MeshConfig())
        self.model, self.params, self.tokenizer = load_model(path, self.mesh)
        self.ends = read_ends(path, self.tokenizer, self.model.decoder.vocab)
        context = self.model.decoder.context
        self.max_length = int(max_length or context)
        if not 2 <= self.max_length <= context:
            raise InputError(f"max_length={max_length}: must be 2 to {context}, the context")
        self.max_gen_toks, self.seed, self.calls = int(max_gen_toks), int(seed), 0
        with jax.set_mesh(self.mesh):
            self.batch = int(batch_size) * row_shards()

    @property
    def eot_token_id(self) -> int:
        """The end-of-sequence token."""
        found: Any = self.tokenizer.eos_token_id
        return self.ends.pad if found is None else found

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that has no context."""
        found: Any = self.tokenizer.bos_token_id
        return self.eot_token_id if found is None else found

    @property
    def tokenizer_name(self) -> str:
        """Names the tokenizer in the harness's cache of requests."""
        return self.path.replace("/", "__")

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Ids of a text; None: with what the tokenizer adds, unless it begins with that."""
        bos: Any = self.tokenizer.bos_token
        begun = bool(bos) and string.startswith(bos)
        special = not begun if add_special_tokens is None else add_special_tokens
        return list(self.tokenizer.encode(string, add_special_tokens=special))

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """A chat as text; without a generation prompt its last message is left open."""
        how = {"tokenize": False, "add_generation_prompt": add_generation_prompt}
        rest = not add_generation_prompt
        return self.tokenizer.apply_chat_template(chat_history, continue_final_message=rest, **how)  # type: ignore[return-value]

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        """Σ log π of each continuation, nats, and whether greedy decoding would write it.

        Args:
          requests: (what it is kept by in the harness's cache, context, continuation), as ids.
        """
        rows = []
        for _key, context, continuation in requests:
            if not 0 < len(continuation) <= self.max_length:
                most = f"{len(continuation)} tokens: must be 1 to max_length={self.max_length}"
                raise InputError(f"a continuation of {most}")
            # The last token is only asked for, so one more than the context fits.
            rows.append((context + continuation)[-self.max_length - 1 :])
        found: list[Any] = [None] * len(rows)
        for places, token_BT, mask_BT in self._batches(rows, self.max_length + 1):
            with jax.set_mesh(self.mesh):
                arrays = put_rows((token_BT, mask_BT), self.mesh)
                logp_BT, best_BT = fetch(_read(self.model, self.params, *arrays))
            for b, place in enumerate(places):
                key, _context, continuation = requests[place]
                end = len(rows[place])
                at = slice(end - len(continuation), end)
                total = float(logp_BT[b, at].sum(dtype=np.float64))
                found[place] = total, bool((token_BT[b, at] == best_BT[b, at]).all())
                if key is not None:
                    self.cache_hook.add_partial("loglikelihood", key, found[place])
        return found

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        """Σ log π of whole texts, nats, in windows of ``max_length`` tokens."""
        windows, counts = [], []
        for (text,) in (request.args for request in requests):
            ids = self.tok_encode(text)
            pieces = get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, 1)
            pieces = [(None, *make_disjoint_window(piece)) for piece in pieces]
            windows, counts = windows + pieces, [*counts, len(pieces)]
        logp_W = np.array([logp for logp, _ in self._loglikelihood_tokens(windows)])
        ends = np.cumsum(counts, dtype=int)
        found = [float(logp_W[end - n : end].sum()) for end, n in zip(ends, counts, strict=True)]
        for request, logp in zip(requests, found, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, logp)
        return found

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        """An answer to each context, cut before the first of its task's strings."""
        groups: dict[str, list[int]] = {}
        for place, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(place)
        found = [""] * len(requests)
        for asked, places in groups.items():
            config, until = self._sampling(json.loads(asked))
            contexts = [requests[place].args[0] for place in places]
            for place, text in zip(places, self._answers(contexts, config), strict=True):
                found[place] = postprocess_generated_text(text, until, None)
                self.cache_hook.add_partial("generate_until", requests[place].args, found[place])
        return found

    def _sampling(self, asked: dict[str, Any]) -> tuple[SampleConfig, list[str]]:
        """How a task wants its answers drawn, and the strings that end them."""
        given: dict[str, Any] = {**normalize_gen_kwargs(asked, self.max_gen_toks)}
        new, until = given.pop("max_gen_toks"), given.pop("until", None) or []
        until = [until] if isinstance(until, str) else [text for text in until if text]
        if not given.pop("do_sample", False):
            given["temperature"] = 0.0
        if unread := sorted(set(given) - set(SAMPLER)):
            raise InputError(f"{', '.join(unread)}: this sampler has no such setting: leave it out")
        if not 0 < new < self.max_length:
            most = f"must be 1 to {self.max_length - 1}, for max_length={self.max_length}"
            raise InputError(f"max_gen_toks={new}: {most}")
        how = {name: SAMPLER[name](value) for name, value in given.items()}
        config = SampleConfig(n=1, max_new_tokens=new, stop_strings=tuple(until), **how)
        check_sample(config)
        return self.ends.settle(config), until

    def _answers(self, contexts: Sequence[str], config: SampleConfig) -> list[str]:
        most = self.max_length - config.max_new_tokens
        rows = [self.tok_encode(text)[-most:] or [self.prefix_token_id] for text in contexts]
        stops = stop_table(self.tokenizer, config.stop_strings, self.model.decoder.vocab)
        texts = [""] * len(rows)
        for places, *arrays in self._batches(rows, most, left=True):
            self.calls += 1
            key = jax.random.fold_in(jax.random.key(self.seed), self.calls)
            with jax.set_mesh(self.mesh):
                given = self.params, *put_rows(tuple(arrays), self.mesh), key, config
                rollout = fetch(_sample(self.model, *given, stops=stops))
            drawn = decode_rollout(
                self.tokenizer, rollout.token_BT, rollout.mask_BT, [""] * len(rollout.token_BT)
            )
            for place, text in zip(places, drawn, strict=False):
                texts[place] = text
        return texts

    def _batches(
        self, rows: Sequence[list[int]], most: int, left: bool = False
    ) -> Iterator[tuple[list[int], np.ndarray, np.ndarray]]:
        """(places of rows, token_BT, mask_BT), the longest rows first: what does not fit in memory
        does not at once. A batch is filled up with its first row."""
        order = sorted(range(len(rows)), key=lambda place: -len(rows[place]))
        for start in range(0, len(order), self.batch):
            places = order[start : start + self.batch]
            some = [rows[place] for place in places]
            some += some[:1] * (self.batch - len(some))
            width = min(most, max(NARROWEST, 1 << (len(some[0]) - 1).bit_length()))
            yield places, *pad_rows(some, width, self.ends.pad, [""] * self.batch, left)


@partial(jax.jit, static_argnums=0)
def _read(model: Model, params: Params, token_BT: Array, mask_BT: Array) -> tuple[Array, Array]:
    """log π(token t | tokens < t) and the likeliest token there, [B, T]; 0 in column 0."""
    hidden, _ = model.apply(params, token_BT, mask_BT)
    before = hidden[:, :-1]
    logp_BT, _ = token_logp(before, *model.projection(params), token_BT[:, 1:], 1.0, False)
    columns = jnp.moveaxis(before, 1, 0)
    best_TB = jax.lax.map(
        lambda column_BD: model.logits(params, column_BD).argmax(-1), columns, batch_size=COLUMNS
    )
    return jnp.pad(logp_BT, ((0, 0), (1, 0))), jnp.pad(best_TB.T, ((0, 0), (1, 0)))


_sample: Callable[..., Rollout] = jax.jit(sample, static_argnums=(0, 5))


if __name__ == "__main__":
    sys.argv.extend(["--model", "jaxrlhf"])
    cli_evaluate()
