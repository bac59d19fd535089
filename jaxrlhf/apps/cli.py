"""The ``jaxrlhf`` command: every subcommand, from words to a call of the room that does the work.

``--help`` must answer at once: what takes long to import is imported by the command that needs it.
"""

import difflib
import errno
import math
import os
import sys
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from tyro.conf import Positional, arg

from jaxrlhf import __version__
from jaxrlhf.apps.shell import (
    COMMANDS,
    as_text,
    beyond_locale,
    command,
    importable,
    never_refuse,
    no_devices,
    prepare_jax,
    settle,
    typed,
)
from jaxrlhf.core.errors import InputError
from jaxrlhf.core.files import unwritable
from jaxrlhf.core.shown import visible


def main(words: Sequence[str] | None = None) -> int:
    """Run one subcommand.

    Args:
      words: the command line without the program's name; ``sys.argv[1:]`` if None.

    Returns:
      The exit status: 0, 2 after bad input (one line ``error: …`` on stderr), 130 after Ctrl-C.
    """
    # In a test, or another program, the interpreter is not this command's to change.
    if words is None:
        settle()
        never_refuse(sys.stdout)
        words = sys.argv[1:]
    if not words or words[0] in ("-h", "--help"):
        print(usage(), file=sys.stdout if words else sys.stderr)
        return 0 if words else 2
    if words[0] == "--version":
        print(f"jaxrlhf {__version__}")
        return 0
    try:
        if (name := words[0]) not in COMMANDS:
            close = difflib.get_close_matches(name, COMMANDS, 1)
            known = f"did you mean {close[0]}?" if close else f"known: {', '.join(COMMANDS)}"
            raise InputError(f"{name}: unknown command ({known})")
        # Dotted names of functions are looked for where the command is given.
        with importable(os.curdir):
            COMMANDS[name][1](list(words[1:]))
    except (InputError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        # Whoever was writing, a user's function say: a full disk is no fault of the program.
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        print(f"error: {unwritable(error.filename or 'a file', error)}", file=sys.stderr)
        return 2
    except UnicodeEncodeError as error:
        # Text files are UTF-8 everywhere; the names of files are what the locale can say.
        if error.encoding != sys.getfilesystemencoding() or error.encoding == "utf-8":
            raise
        print(f"error: {beyond_locale(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except Exception:
        # Without a device whatever comes first fails, each in its own words.
        if not (problem := no_devices()):
            raise
        print(f"error: {problem}", file=sys.stderr)
        return 2
    return 0


def usage() -> str:
    """The help of the command as a whole."""
    width = max(map(len, COMMANDS)) + 4
    lines = (f"  {name:<{width}}{text}" for name, (text, _) in COMMANDS.items())
    return (
        "usage: jaxrlhf COMMAND …\n\nReinforcement learning from human feedback in JAX.\n\n"
        + "\n".join(lines)
        + "\n\njaxrlhf COMMAND --help lists what a command takes; --version says which it is."
    )


RESUME = "--resume-with-changes"
"""The word that lets a run go on with other settings; no field of CONFIG."""


@command("train", "train as a YAML file says: train CONFIG [--dotted.key value …]", raw=True)
def train(words: list[str]) -> None:
    """Load CONFIG, change it by the words after it, check it, train."""
    from jaxrlhf.config import Config, check, load, locate_config, override

    if words[:1] in (["-h"], ["--help"]):
        override(Config(), ["--help"])
    if not words or words[0].startswith("-"):
        raise InputError("train: CONFIG, the path of a YAML file, comes first")
    changes = [word for word in words[1:] if word != RESUME]
    config = load(words[0], changes)
    check(config)
    prepare_jax()
    from jaxrlhf.models.hub import fetch_all
    from jaxrlhf.models.read import read_ahead

    config = fetch_all(config)
    # The disk reads weights while the modules below are imported and programs traced.
    read_ahead(config.model)
    from jaxrlhf.mesh import processes as distributed
    from jaxrlhf.run import loop

    with (
        importable(locate_config(words[0]).parent),
        distributed.together(config.distributed) as watchdog,
    ):
        placeless = distributed.placeless(config)
        loop.train(placeless, feed=watchdog.feed, leave=0, may_change=RESUME in words)


@command("init", "a commented config to begin with: init ALGORITHM [--data FILE]")
def init(
    algorithm: Annotated[Positional[str], arg(metavar="ALGORITHM")],
    data: str = "",
    reward: str = "",
    model: str = "smollm2",
    output: Annotated[str, arg(aliases=("-o",))] = "",
) -> None:
    """Write a config that runs, as wide as the data asks for, with a comment at each line.

    Args:
      algorithm: ppo, grpo, dpo, sft, reward_model, …; another word lists them.
      data: rows to learn from, .jsonl or .parquet; without it, those that come with the package.
      reward: a function, package.module:function or sentiment, or a reward model's folder.
      model: smollm2, a Hugging Face folder, a .gguf file, or the output folder of a run.
      output: the YAML file; ALGORITHM.yaml, if empty.
    """
    prepare_jax()
    from jaxrlhf.apps.init import write_config

    print(write_config(algorithm, data, reward, model, output))


@command("plan", "what a run takes, on devices not at hand: plan CONFIG --topology NAME", raw=True)
def plan(words: list[str]) -> None:
    """Load CONFIG, change it by the words after it, and say what it would take on a topology."""
    import argparse

    parser = argparse.ArgumentParser(
        prog="jaxrlhf plan",
        usage="jaxrlhf plan CONFIG --topology NAME [options] [--dotted.key value …]",
        description="Compile what CONFIG would run, for devices that need not be here, and print "
        "bytes, exchanges, FLOPs and a lower bound of the time of every step. Reads neither data "
        "nor tokenizer nor weights. Ends with status 2 if a step does not fit.",
        allow_abbrev=False,
    )
    parser.add_argument("config", metavar="CONFIG", help="a YAML file")
    parser.add_argument(
        "--topology",
        required=True,
        metavar="NAME",
        help="v4:4x4x4, v5e:16x16, v5p:8x8x8, v6e:16x16 (chips along each dimension); a100:8, "
        "h100:8, h200:8, b200:8; cpu:8 (fake CPU devices); here",
    )
    parser.add_argument("--mean-length", type=float, metavar="TOKENS", help="of a response; "
        "without it every response is as long as it may be")  # fmt: skip
    parser.add_argument("--memory", type=float, metavar="GIB", help="of a device, if not its own")
    parser.add_argument("--search", action="store_true", help="rank other meshes, microbatches")
    parser.add_argument("--explain", default="", metavar="STEP", help="plan this step alone, and "
        "list the instructions that move most bytes")  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    # What is left over are changes of the config, which its loader reads.
    given, changes = parser.parse_known_args(words)
    from jaxrlhf.study.plan.gpus import tools
    from jaxrlhf.study.plan.topology import environment, parse

    topology = parse(given.topology, gpus=tools() is not None)
    if given.mean_length is not None and not 1 <= given.mean_length < math.inf:
        raise InputError(
            f"--mean-length {given.mean_length:g}: must be at least 1 token, and finite"
        )
    if given.memory is not None and not 0 < given.memory < math.inf:
        raise InputError(f"--memory {given.memory:g}: must be above 0 GiB, and finite")
    from jaxrlhf.config import check, is_on_policy, load

    config = load(given.config, changes)
    check(config)
    mean, most = given.mean_length, config.sample.max_new_tokens
    if mean is not None and is_on_policy(config) and mean > most:
        raise InputError(f"--mean-length {mean:g}: above sample.max_new_tokens={most}: lower it")
    # Fake devices are asked for by variables, which jax reads when it is imported.
    os.environ.update(environment(topology, os.environ.get("XLA_FLAGS", ""), tools()))
    prepare_jax()
    from jaxrlhf.study.plan.advice import run

    memory, rank = given.memory, given.search
    run(config, topology, given.mean_length, memory, rank, not given.json, given.explain)


@command("demo", "a whole training run in minutes, on a CPU too: demo [--tiny]")
def demo(output: str = "", tiny: bool = False, seed: int = 0) -> None:
    """Train a small model from sampling to evaluation, and show what it has learnt.

    Args:
      output: folder that the runs are written to; runs/demo, or runs/tiny, if empty.
      tiny: a model of a few thousand parameters, in seconds; shows that everything works.
      seed: every draw follows from it.
    """
    prepare_jax()
    from jaxrlhf.apps.demo import run

    run(output, tiny, seed)


@command("pipeline", "several runs, one after the other, as a YAML file says")
def pipeline(
    config: Annotated[Positional[str], arg(metavar="CONFIG")],
    output: str = "",
    seed: int | None = None,
) -> None:
    """Carry out the stages that a YAML file lists: data, runs, evaluations.

    A stage that is done is not done again, one that was interrupted goes on.

    Args:
      config: the YAML file.
      output: folder of the stages, in place of the file's.
      seed: every draw follows from it; in place of the file's.
    """
    from jaxrlhf.config import load_pipeline, locate_config

    stages = load_pipeline(config, output, seed)
    prepare_jax()
    from jaxrlhf.apps.pipeline import run_pipeline

    with importable(locate_config(config).parent):
        run_pipeline(stages, own_process=True)


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


@command("eval", "held-out: rewards, KL, best-of-n; of a reward model accuracy: eval RUN", raw=True)
def evaluate(words: list[str]) -> None:
    """Measure MODEL on held-out prompts, beside what it must beat, and print the figures."""
    from jaxrlhf.config import parse_evaluate

    wish = parse_evaluate(words)
    prepare_jax()
    from jaxrlhf.models.load import scores_texts

    if scores_texts(wish.model):
        from jaxrlhf.study import reward_bench

        print(reward_bench.table(reward_bench.measure(wish)))
        return
    from jaxrlhf.study.evaluate import evaluate_model
    from jaxrlhf.study.figures import table

    print(table(evaluate_model(wish)))


@command("report", "a page about a run, or several compared: report RUN… [--watch]")
def report(
    runs: Annotated[Positional[tuple[str, ...]], arg(metavar="RUN…")],
    output: str = "",
    watch: bool = False,
    port: int = 0,
) -> None:
    """Write one page about a run, or about several side by side, that needs no network to be read.

    A pipeline's folder stands for its last run.

    Args:
      runs: output folders of runs, or of pipelines.
      output: the .html file; report.html in the folder of a single run, if empty.
      watch: write no file, but serve the page to this machine, and follow the runs.
      port: where to serve it; 0 takes a free one.
    """
    if watch:
        from jaxrlhf.apps.watch import watch as follow

        if output:
            raise InputError("--output and --watch: a page that is watched is no file: give one")
        follow(runs, port)
        return
    from jaxrlhf.run.report import write_report

    print(write_report(runs, output))


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


@command("diagnose", "what is wrong with a run, why, and what to do: diagnose RUN")
def diagnose(
    run: Annotated[Positional[str], arg(metavar="RUN")], json: bool = False, strict: bool = False
) -> None:
    """Say what is wrong with a run, finished or not, by what it has written down.

    Prints each finding with its evidence and remedy, and writes them to RUN/diagnosis.json.

    Args:
      run: the output folder of a run.
      json: print the contents of diagnosis.json instead.
      strict: exit with status 1 if there is a problem; warnings are none.
    """
    from jaxrlhf.study.diagnose import examine, read_history, save, show, to_json

    history = read_history(run)
    findings = examine(history)
    if json:
        print(to_json(history, findings))
    else:
        show(run, history, findings)
    save(run, history, findings)
    if strict and any(finding.severity == "problem" for finding in findings):
        raise SystemExit(1)


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
