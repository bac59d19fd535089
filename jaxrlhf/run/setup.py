"""From a config to everything a run needs: data, networks, states and jitted programs."""

from dataclasses import dataclass, field, replace
from typing import Any

import jax
from jax.sharding import Mesh

from jaxrlhf.algorithms import ALGORITHMS, Algorithm
from jaxrlhf.config import (
    Config,
    ModelConfig,
    RewardConfig,
    check,
    check_mesh,
    has_critic,
    has_reference,
    is_on_policy,
    is_reward_model,
    rows_at_once,
)
from jaxrlhf.core.types import Params, StopTable, TrainState
from jaxrlhf.data.chat import with_date
from jaxrlhf.data.formats import column_names
from jaxrlhf.data.rows import Rows
from jaxrlhf.data.tokens import Encoded, load_data, load_normalise_rows, longest
from jaxrlhf.mesh.sharding import (
    at_hand,
    config_of,
    length_shards,
    make_mesh,
    train_state_shardings,
    with_layout,
)
from jaxrlhf.models.ends import read_ends
from jaxrlhf.models.hub import fetch_all, fetch_shape, is_adapter
from jaxrlhf.models.load import (
    Loader,
    Network,
    abstract_params,
    build,
    check_context,
    check_speaks_alike,
    is_run,
    needs_head,
    offloaded,
    settle_lora,
    start_params,
    starting,
    tokenizer_path,
)
from jaxrlhf.models.quantise import KINDS
from jaxrlhf.models.read import is_reward_folder
from jaxrlhf.models.stop_strings import stop_table
from jaxrlhf.models.tokenizer import check_same_tokens, check_vocab, load_tokenizer
from jaxrlhf.models.transformer import Model
from jaxrlhf.rewards.judge import (
    Judge,
    check_columns,
    check_truths,
    load_rewards,
    make_judge,
)
from jaxrlhf.run.programs import (
    OfflinePrograms,
    OnPolicyPrograms,
    critic_config,
    offline_programs,
    on_policy_programs,
    optimizer,
)
from jaxrlhf.run.stopping import keep
from jaxrlhf.steps.divergence import Taught


@dataclass(frozen=True)
class Run:
    """A run that is ready to start. ``programs`` are pure and jitted; states are its only state."""

    config: Config
    """Resolved: what ends a response is the model's record, and what the config adds."""
    mesh: Mesh
    model: Model
    algorithm: Algorithm
    train_rows: Rows[Encoded]
    eval_rows: Rows[Encoded] | None = None
    tokenizer: Any = None
    notes: tuple[str, ...] = ()
    """What is to be said once, at the start."""
    stops: StopTable | None = None
    """The automaton of ``config.sample.stop_strings``."""
    states: dict[str, TrainState] = field(default_factory=dict)
    """What is trained, at its start: policy, and critic if it is separate."""
    frozen: dict[str, Params | None] = field(default_factory=dict)
    """What each of them is trained on top of, by the same names: the weights under adapters."""
    reference: Network | None = None
    critic: Model | None = None
    """A separate critic's; None where the policy's trunk serves."""
    judge: Judge | None = None
    gold: Judge | None = None
    programs: Any = None
    """OnPolicyPrograms, or OfflinePrograms of a run that learns from rows."""
    normalise_rows: Rows[Encoded] | None = None
    """Answers whose scores a reward model is normalised on."""
    candidates: int = 1
    """C, the most answers that a row of the data has."""
    width: int = 0
    """T of a batch of whole rows: as many columns as the longest row has tokens."""


def setup(config: Config, mesh: Mesh | None = None, abstract: bool = False) -> Run:
    """Read the data and the networks of a run, and make its programs.

    Call it, and all that follows, under ``jax.set_mesh(mesh)``.

    Args:
      abstract: leave out the weights: shapes with layouts stand where arrays would, which is all
        that compiling takes (``ahead``) and costs nothing. ``fill`` does the rest.

    Raises:
      InputError: whatever in config, data or weights cannot be used; nothing is written before.
    """
    config = fetch_all(config)
    config = replace(config, model=settle_lora(config.model))
    run = _described(config, mesh)
    tokenizer = load_tokenizer(tokenizer_path(config.model))
    config = with_date(config, tokenizer)
    vocab = run.model.decoder.vocab
    check_vocab(tokenizer, run.model.decoder)
    ends = read_ends(config.model.path, tokenizer, vocab)
    config = replace(config, sample=ends.settle(config.sample))
    train_rows = load_data(config, config.data.train, tokenizer, vocab)
    held_out = (config, config.data.eval, tokenizer, vocab, True)
    eval_rows = load_data(*held_out) if config.data.eval else None
    normalise_rows = load_normalise_rows(config, tokenizer, vocab)
    # One width for all batches, so that each program is compiled once.
    every = [row for part in (train_rows, eval_rows, normalise_rows) if part for row in part.items]
    run = replace(
        run,
        config=config,
        tokenizer=tokenizer,
        notes=(ends.note(),),
        stops=stop_table(tokenizer, config.sample.stop_strings, vocab),
        train_rows=train_rows,
        eval_rows=eval_rows,
        normalise_rows=normalise_rows,
        candidates=max(len(row.answers) for row in every),
        width=longest(every, length_shards()),
    )
    run = _on_shapes(run, _loader(run, abstract=True))
    if "teacher" in run.algorithm.needs:
        path = tokenizer_path(ModelConfig(config.reference.path))
        check_same_tokens("reference.path", load_tokenizer(path), tokenizer)
    return run if abstract else fill(run)


def outline(config: Config, mesh: Mesh | None = None) -> Run:
    """A run as far as its config alone describes it: shapes, layouts and programs.

    Neither data nor tokenizer nor weights are read, so they need not be there yet. A reward model
    whose run is not there is taken to have the policy's shape. Call it outside of
    ``jax.set_mesh(mesh)`` if nothing can be run on the mesh's devices.

    Raises:
      InputError: whatever in config or in the headers of its models cannot be used.
    """
    config = replace(config, model=settle_lora(fetch_shape(config.model)))
    run = _described(config, mesh)
    stop = config.sample.stop or (0,)  # the tokenizer's, whichever it is
    run = replace(run, config=replace(config, sample=replace(config.sample, stop=stop)))
    return _on_shapes(run, _loader(run, abstract=True, stand_in=config.model))


def _described(config: Config, mesh: Mesh | None) -> Run:
    """The run's config, mesh, model and algorithm; all else is empty."""
    check(config)
    mesh = mesh or make_mesh(config.mesh)
    model = build(config.model)
    given = rows_at_once(config), config.sample.slots
    check_mesh(config_of(mesh), model.decoder, mesh.size, *given)
    check_context(config, model)
    return Run(
        config=config,
        mesh=mesh,
        model=model,
        algorithm=ALGORITHMS[config.algorithm.name](config.algorithm),
        train_rows=Rows((), config.data.train),
        width=config.data.max_tokens,
    )


def _on_shapes(run: Run, loader: Loader) -> Run:
    """The run with shapes and layouts of its networks, and its programs."""
    run = _networks(run, loader)
    return replace(run, programs=_programs(run))


def fill(run: Run) -> Run:
    """A run that was set up without its weights, with them; its programs stay the same objects."""
    return _networks(run, _loader(run))


def _loader(run: Run, **more: Any) -> Loader:
    model = run.config.model
    kept = {"dtype": model.dtype, "frozen_dtype": model.frozen_dtype}
    narrow = model.lora is not None and model.frozen_dtype in KINDS
    return Loader(run.mesh, narrow=narrow, **kept, **more)


def _networks(run: Run, loader: Loader) -> Run:
    """The run with what it trains, and what it trains that with: reference, critic, rewards."""
    config, model = run.config, run.model
    # Adapters but for DoRA's do not depend on the weights, which are still being read.
    if model.lora and not model.lora.dora:
        ready = Network(model, {}, loader.adapter(config.model))
    else:
        ready = loader.base(config.model, config.seed)
        ready = replace(ready, lora=loader.adapter(config.model))
    states = {"policy": start_state(config, ready, needs_head(config), loader)}
    start = loader.base(config.model, config.seed)
    # Kept beside what learns, and in every checkpoint: see stopping.
    if config.eval.patience:
        states["best"] = keep(states["policy"])
    frozen = {"policy": loader.frozen(start).params if model.lora else None}
    # The start is the reference: its arrays are shared, and never donated.
    reference = loader.frozen(start) if has_reference(config) else None
    if config.reference.path:
        named = replace(config.model, path=config.reference.path, decoder=None)
        reference = loader.frozen(loader.base(named))
        check_speaks_alike("reference.path", reference, config, model)
    if reference is not None and config.reference.offload:
        reference = offloaded(reference, run.mesh, "reference.offload")
    run = replace(run, states=states, frozen=frozen, reference=reference)
    if not is_on_policy(config):
        return run
    critic = None
    if has_critic(config) and config.critic.kind == "separate":
        # A critic starts as the policy does, as a run's reward model, or as another model.
        critic = start
        if config.critic.path and (is_run(config.critic.path) or is_adapter(config.critic.path)):
            critic = loader.trained(config.critic.path)
        elif config.critic.path:
            named = replace(config.model, path=config.critic.path, decoder=None)
            critic = loader.base(named, head=is_reward_folder(named.path))
        check_speaks_alike("critic.path", critic, config, model)
        states["critic"] = start_state(critic_config(config), critic, True, loader)
        frozen["critic"] = loader.frozen(critic).params if critic.model.lora else None

    def judge(rewards: tuple[RewardConfig, ...], field: str, before: Judge | None) -> Judge:
        vocab, limit = model.decoder.vocab, config.max_excluded
        sources = before.sources if before else load_rewards(rewards, field)
        asked = (run.train_rows if field == "rewards" else None, run.eval_rows)
        prompts = [row.source for part in asked if part for row in part.items]
        columns = column_names(prompts)
        # Asked for once: `fill` comes by again, with the same sources.
        if prompts and not before:
            check_columns(sources, columns)
            check_truths(sources, prompts)
        return make_judge(rewards, loader, run.tokenizer, vocab, field, limit, sources, columns)

    return replace(
        run,
        states=states,
        frozen=frozen,
        critic=critic and critic.model,
        judge=judge(config.rewards, "rewards", run.judge) if config.rewards else None,
        gold=judge(config.eval.gold, "eval.gold", run.gold) if config.eval.gold else None,
    )


def _programs(run: Run) -> OnPolicyPrograms | OfflinePrograms:
    if not is_on_policy(run.config):
        other = run.reference and run.reference.model
        return offline_programs(run.config, run.algorithm, run.model, other, run.states, run.mesh)
    assert run.reference is not None
    return on_policy_programs(
        run.config,
        run.algorithm,
        run.model,
        run.reference.model,
        run.critic or run.model,
        run.states,
        run.frozen["policy"],
        run.mesh,
        run.stops,
    )


def start_state(config: Config, network: Network, head: bool, loader: Loader) -> TrainState:
    """A TrainState at its start, laid out on the mesh; shapes, if that is all the loader gives."""
    params, tx = abstract_params(network.model, head, loader.mesh), optimizer(config)
    state = jax.eval_shape(lambda p: TrainState.create(p, tx), params)
    layout = jax.tree.map(lambda x: x.sharding, params)
    layout = train_state_shardings(tx, params, layout, loader.mesh)
    if loader.abstract:
        return with_layout(state, layout)
    start, given = starting(network, head, config.seed, random_head=is_reward_model(config))
    # One program makes parameters and optimizer state where they are to lie; none is ever whole.
    return jax.jit(lambda *x: TrainState.create(start(*x), tx), out_shardings=layout)(*given)


def beneath(run: Run) -> Any:
    """What the policy's update is given as ``frozen``: the weights under adapters, or None; beside
    them the teacher's, where there is one."""
    base = run.frozen["policy"]
    if "teacher" not in run.algorithm.needs:
        return base
    assert run.reference is not None
    return Taught(base, at_hand(run.reference.params))


def start_of(run: Run) -> Params:
    """A fresh copy of the policy's trainable parameters as they were before the first update."""
    config = run.config
    weights, head, scores = run.frozen["policy"], needs_head(config), is_reward_model(config)
    if weights is None and run.reference is not None and not config.reference.path:
        weights = at_hand(run.reference.params)
    if weights is None:
        weights = Loader(run.mesh).base(config.model, config.seed).params
    return start_params(Network(run.model, weights), head, config.seed, run.mesh, scores)
