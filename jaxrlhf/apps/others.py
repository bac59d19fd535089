"""Commands on models, and about the machine: words → a call of the room that does it.

``--help`` must answer at once: what takes long to import is imported by the command that needs it.
"""

import sys
from typing import Annotated, Any, Literal

from tyro.conf import Positional, arg

from jaxrlhf.apps.shell import COMMANDS, as_text, command, prepare_jax, typed
from jaxrlhf.core.errors import InputError
from jaxrlhf.core.shown import visible


@command("generate", "answers to prompts: generate MODEL --prompt TEXT")
def generate(
    model: Annotated[Positional[str], arg(metavar="MODEL")],
    prompt: tuple[str, ...] = (),
    prompts: str = "",
    raw: bool = False,
    n: int = 1,
    temperature: float = 1.0,
    max_new_tokens: int = 64,
    reward: str = "",
    reward_model: str = "",
    keep: Literal["all", "best", "resample"] = "all",
    beta: float = 1.0,
    seed: int = 0,
) -> None:
    """Answer prompts, and print the answers, one after the other.

    A prompt is what a user says, if the model has a chat template. One answer to one prompt is
    written to a terminal as it is drawn.

    Args:
      model: smollm2, a Hugging Face folder, a .gguf file, or the output folder of a run.
      prompt: one or more texts.
      prompts: instead, a file of them: .txt, one a line, or .jsonl or .parquet with the column
        prompt, texts or messages, whose other columns a reward is given.
      raw: continue texts as they are, without the chat template.
      n: answers a prompt.
      temperature: logits are divided by this; 0 takes the likeliest token.
      max_new_tokens: most tokens of an answer.
      reward: a function that judges answers: sentiment, or package.module:function.
      reward_model: instead, a reward model: the folder of its run, or of a sequence classifier.
      keep: of a prompt's answers all, the best by the reward, or one drawn in proportion to
        exp(reward / beta).
      beta: of that draw, reward units a nat.
      seed: every draw follows from it.
    """
    from jaxrlhf.config import SampleConfig, check_sample

    if bool(prompt) == bool(prompts):
        raise InputError("--prompt, --prompts: give at least one text, or a file, and not both")
    judge = judge_of(reward, reward_model)
    wish = SampleConfig(n=n, temperature=temperature, max_new_tokens=max_new_tokens)
    check_sample(wish)
    prepare_jax()
    from jaxrlhf.apps.generate import ENDED_AT_ONCE, complete, read_asked

    given = read_asked(prompts) if prompts else tuple(map(as_text, prompt))
    if n == len(given) == 1 and judge is None and sys.stdout.isatty():
        from jaxrlhf.apps.talk import answer

        answer(model, given[0], wish, seed, chat=not raw)
        return
    for row in complete(model, given, wish, judge, keep, beta, seed, chat=not raw):
        for text, score in row:
            said = visible(text, lines=True) if text.strip() else ENDED_AT_ONCE
            print(said if score is None else f"{score:.3f}\t{said}")


def judge_of(reward: str, reward_model: str) -> Any:
    """What judges answers, by words of the command line; None if nothing does."""
    from jaxrlhf.config import RewardConfig
    from jaxrlhf.models.hub import fetch

    if reward and reward_model:
        raise InputError("--reward and --reward-model: give one of them")
    return RewardConfig(reward, fetch(reward_model)) if reward or reward_model else None


@command("chat", "talk to a model, or to two side by side: chat MODEL [--against MODEL]")
def chat(
    model: Annotated[Positional[str], arg(metavar="MODEL")],
    against: str = "",
    system: str = "",
    temperature: float = 0.7,
    max_new_tokens: int = 256,
    reward: str = "",
    reward_model: str = "",
    seed: int = 0,
) -> None:
    """Talk to a model: each line is a message, and the answer is written as it is drawn.

    /clear begins anew, /system TEXT says what the model is told first, Ctrl-C ends an answer,
    Ctrl-D the conversation.

    Args:
      model: smollm2, a Hugging Face folder, a .gguf file, or the output folder of a run.
      against: another, which answers the same messages, in a conversation of its own.
      system: what the model is told before all messages.
      temperature: logits are divided by this; 0 takes the likeliest token.
      max_new_tokens: most tokens of an answer.
      reward: a function that judges answers: sentiment, or package.module:function.
      reward_model: instead, a reward model: the folder of its run, or of a sequence classifier.
      seed: every draw follows from it.
    """
    from jaxrlhf.config import SampleConfig, check_sample

    wish = SampleConfig(n=1, temperature=temperature, max_new_tokens=max_new_tokens)
    check_sample(wish)
    judge = judge_of(reward, reward_model)
    prepare_jax()
    from jaxrlhf.apps.talk import converse

    converse([model, against] if against else [model], wish, judge, as_text(system), seed)


@command("export", "a run's policy as a Hugging Face folder: export RUN OUT")
def export(
    run: Annotated[Positional[str], arg(metavar="RUN")],
    out: Annotated[Positional[str], arg(metavar="OUT")],
    dtype: Literal["float32", "bfloat16"] = "float32",
    adapter: bool = False,
    push: str = "",
) -> None:
    """Write the policy of a run as a folder that transformers, vLLM and llama.cpp can load.

    A reward model becomes a …ForSequenceClassification with one label. Weights are written one
    after the other, in files of at most 5 GB.

    Args:
      run: the output folder of a run, or whatever else is a model.
      out: a new folder.
      dtype: of the weights in it; bfloat16 halves them, and rounds.
      adapter: write the adapters of a run alone, as the package peft reads them.
      push: org/name, a repository of the Hugging Face hub that the folder is then uploaded to; it
        is made, private, if it is not there.
    """
    prepare_jax()
    from jaxrlhf.models.export import export_adapter, export_model
    from jaxrlhf.models.hub import check_name, push_folder

    if push:
        check_name("--push", push)
    if adapter:
        base = export_adapter(run, out, dtype)
        print(f"{out}: adapters of {base or 'a fresh decoder, which has no folder'}")
    elif bias := export_model(run, out, dtype):
        print(f"{out}: transformers adds no bias: its scores are {-bias:+.4g} from the run's")
    if push:
        print(push_folder(out, push))


@command("serve", "rewards by HTTP: serve RUN|package.module:function")
def serve(
    what: Annotated[Positional[str], arg(metavar="RUN|FUNCTION")],
    host: str = "127.0.0.1",
    port: int = 8000,
    batch_size: int = 32,
    concurrency: int = 1,
    header_env: str = "",
    max_tokens: int | None = None,
    token_env: str = "",
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
      token_env: environment variable with a token: the header must be "Bearer" and this token.
    """
    prepare_jax()
    from jaxrlhf.apps import serve as serving

    server = serving.serve(
        what, host, port, batch_size, concurrency, header_env, max_tokens, token_env
    )
    print(f"{what} → {server.url}", flush=True)
    serving.attend(server)


@command("tasks", "tasks of reasoning-gym as rows of data: tasks TASK OUT", raw=True)
def tasks(words: list[str]) -> None:
    """Write tasks of reasoning-gym as rows of data."""
    from jaxrlhf.data import tasks

    typed(tasks.tasks)(words)


@command("env", "versions and devices")
def env() -> None:
    """Print the versions that matter in a bug report, and the devices, or why there are none."""
    prepare_jax()
    from jaxrlhf.apps.env import lines

    print(*lines(), sep="\n")


@command("completion", "a script that completes words in a shell: completion bash|zsh")
def completion(shell: Annotated[Positional[Literal["bash", "zsh"]], arg(metavar="SHELL")]) -> None:
    """Print a script by which a shell completes commands and options; its first lines say where to.

    Args:
      shell: bash or zsh.
    """
    from jaxrlhf.apps.completion import script

    print(script(shell, COMMANDS), end="")
