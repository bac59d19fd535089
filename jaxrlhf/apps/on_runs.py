"""Commands that begin a run, or read what one has left: words → a call of the room that does it.

``--help`` must answer at once: what takes long to import is imported by the command that needs it.
"""

import math
import os
from typing import Annotated

from tyro.conf import Positional, arg

from jaxrlhf.apps.shell import command, importable, prepare_jax
from jaxrlhf.core.errors import InputError

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
        "h100:8, h200:8, b200:8, rtx4090:1; cpu:8 (fake CPU devices); here",
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
    os.environ.update(environment(topology, os.environ, tools()))
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


@command("eval", "held-out: rewards, KL, best-of-n; of a reward model accuracy: eval RUN", raw=True)
def evaluate(words: list[str]) -> None:
    """Measure MODEL on held-out prompts, beside what it must beat, and print the figures."""
    from jaxrlhf.config import check_evaluate, parse_evaluate

    wish = parse_evaluate(words)
    check_evaluate(wish)
    prepare_jax()
    from jaxrlhf.models.hub import fetch_fields
    from jaxrlhf.models.load import scores_texts

    wish = fetch_fields(wish, "model")
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
      runs: output folders of runs, or of pipelines, or their URLs.
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


@command("diagnose", "what is wrong with a run, why, and what to do: diagnose RUN")
def diagnose(
    run: Annotated[Positional[str], arg(metavar="RUN")], json: bool = False, strict: bool = False
) -> None:
    """Say what is wrong with a run, finished or not, by what it has written down.

    Prints each finding with its evidence and remedy, and writes them to RUN/diagnosis.json; of a
    URL, to that of its copy here.

    Args:
      run: the output folder of a run, or its URL.
      json: print the contents of diagnosis.json instead.
      strict: exit with status 1 if there is a problem; warnings are none.
    """
    from jaxrlhf.run.folder import run_here
    from jaxrlhf.study.diagnose import examine, read_history, save, show, to_json

    place = run_here(run)
    history = read_history(place)
    findings = examine(history)
    if json:
        print(to_json(history, findings))
    else:
        show(run, history, findings)
    save(place, history, findings)
    if strict and any(finding.severity == "problem" for finding in findings):
        raise SystemExit(1)
