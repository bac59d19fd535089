"""The commands that use what was trained: generate, eval, export, serve."""

from typing import Annotated, Literal

from tyro.conf import Positional, arg

from jaxrlhf.cli.environment import prepare_jax
from jaxrlhf.cli.parsing import typed
from jaxrlhf.errors import InputError


def generate(
    model: Annotated[Positional[str], arg(metavar="MODEL")],
    prompt: tuple[str, ...] = (),
    n: int = 1,
    temperature: float = 1.0,
    max_new_tokens: int = 64,
    reward: str = "",
    reward_model: str = "",
    keep: Literal["all", "best", "resample"] = "all",
    beta: float = 1.0,
    seed: int = 0,
) -> None:
    """Complete prompts, as plain text, and print the completions, one after the other.

    Args:
      model: smollm2, a Hugging Face folder, a .gguf file, or the output folder of a run.
      prompt: one or more texts to complete.
      n: completions a prompt.
      temperature: logits are divided by this; 0 takes the likeliest token.
      max_new_tokens: most tokens of a completion.
      reward: a function that judges completions: sentiment, or package.module:function.
      reward_model: instead, a reward model: the folder of its run, or of a sequence classifier.
      keep: of a prompt's completions all, the best by the reward, or one drawn in proportion to
        exp(reward / beta).
      beta: of that draw, reward units a nat.
      seed: every draw follows from it.
    """
    from jaxrlhf.config import RewardConfig, SampleConfig, check_sample

    if not prompt:
        raise InputError("--prompt: missing: give at least one text to complete")
    if reward and reward_model:
        raise InputError("--reward and --reward-model: give one of them")
    wish = SampleConfig(n=n, temperature=temperature, max_new_tokens=max_new_tokens)
    check_sample(wish)
    prepare_jax()
    from jaxrlhf.generating import complete

    judge = RewardConfig(reward, reward_model) if reward or reward_model else None
    for row in complete(model, prompt, wish, judge, keep, beta, seed):
        for text, score in row:
            print(text if score is None else f"{score:.3f}\t{text}")


def evaluate(words: list[str]) -> None:
    """Measure MODEL on held-out prompts, beside what it must beat, and print the figures."""
    from jaxrlhf.config import parse_evaluate

    wish = parse_evaluate(words)
    prepare_jax()
    from jaxrlhf.evaluating import evaluate_model, table

    print(table(evaluate_model(wish)))


def export(
    run: Annotated[Positional[str], arg(metavar="RUN")],
    out: Annotated[Positional[str], arg(metavar="OUT")],
) -> None:
    """Write the policy of a run as a folder that transformers, vLLM and llama.cpp can load.

    A reward model becomes a …ForSequenceClassification with one label.

    Args:
      run: the output folder of a run, or whatever else is a model.
      out: a new folder.
    """
    prepare_jax()
    from jaxrlhf.config import ProcessRewardModelConfig
    from jaxrlhf.files import writing
    from jaxrlhf.models.hf import check_new, write_hf
    from jaxrlhf.networks import is_run, load_model, run_config, scores_texts

    scores = scores_texts(run)
    if is_run(run) and isinstance(run_config(run).algorithm, ProcessRewardModelConfig):
        raise InputError(f"{run}: a process reward model; transformers has no such class")
    check_new(out)
    model, params, tokenizer = load_model(run)
    if not scores:  # a head would be a critic's
        params = {name: part for name, part in params.items() if name != "head"}
    with writing(out):
        write_hf(out, model.decoder, params, tokenizer, head=scores)
    if scores and (bias := float(params["head"]["bias"])):
        print(f"{out}: transformers adds no bias: its scores are {-bias:+.4g} from the run's")


def serve(
    what: Annotated[Positional[str], arg(metavar="RUN|FUNCTION")],
    host: str = "127.0.0.1",
    port: int = 8000,
    batch_size: int = 32,
    concurrency: int = 1,
    header_env: str = "",
    max_tokens: int | None = None,
) -> None:
    """Serve rewards by HTTP, as docs/reward_service.md describes, until interrupted.

    Args:
      what: the output folder of a reward-model run, the Hugging Face folder of a sequence
        classifier with one label, or package.module:function.
      host: where to listen; 0.0.0.0 is everywhere.
      port: where to listen; 0 takes a free one.
      batch_size: rows that a reward model scores at once.
      concurrency: requests that a function is asked at once.
      header_env: environment variable with the value that requests must have in their header
        Authorization; empty lets everybody in.
      max_tokens: most tokens of a row that a reward model scores; None: as its run was trained, or
        up to 1,024 for a folder.
    """
    prepare_jax()
    from jaxrlhf import serving

    with serving.serve(what, host, port, batch_size, concurrency, header_env, max_tokens) as server:
        print(f"{what} → {server.url}", flush=True)
        server.serve_forever()


def tasks(words: list[str]) -> None:
    """Write tasks of reasoning-gym as rows of data."""
    from jaxrlhf.data import tasks

    typed(tasks.tasks)(words)
