"""jaxrlhf beside its peers on this machine: make benchmark ARGS="--subjects grpo --rounds 3".

Sets up a virtual environment for each peer under .venv-peers/, writes SmolLM2-135M there once as
all of them read it, and runs each subject with each peer in turn, a fresh process each time, as
many rounds as asked for. Medians over all calls of all rounds go to standard output as Markdown, a
section for benchmarks/RESULTS.md. Wants a machine with nothing else to do: it says how busy it was.

Every response has the same length: the folder's end-of-sequence token is one that is never drawn.
A script that fails is said on standard error, and the others go on.
``--quick`` takes the smallest shapes, to see that every script works.
"""

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
from clock import MARK, Task
from transformers import AutoTokenizer

import jaxrlhf as rl
from jaxrlhf.models.hf import write_hf

HIDDEN = ("JAX_COMPILATION_CACHE_DIR", "PYTHONPATH")
"""Variables that a peer is not to have of its caller."""

HERE = Path(__file__).parent
PLACE = HERE.parents[1] / ".venv-peers"
NEVER_DRAWN = "<file_sep>"
"""A token of SmolLM2's that its texts do not have."""

WORDS = ("river", "stone", "light", "house", "green", "winter", "music", "paper", "water")
"""One token each, after a space."""

TORCH = ("torch==2.13.0", "transformers==5.24.0", "accelerate", "datasets==5.2.0")


@dataclass(frozen=True)
class Peer:
    """Somebody else's code, and where it runs."""

    script: str
    packages: tuple[str, ...]
    subjects: tuple[str, ...]


PEERS = {
    "jaxrlhf": Peer("on_jaxrlhf.py", (), ("sampling", "sft", "grpo", "ppo", "startup")),
    "HF, TRL 1.16": Peer(
        "on_transformers.py", (*TORCH, "trl==1.16.0"), ("sampling", "sft", "grpo", "startup")
    ),
    "TRL 1.12": Peer("on_trl_ppo.py", (*TORCH, "trl==1.12.0"), ("ppo",)),
    "Tunix 0.1.7": Peer(
        "on_tunix.py", ("google-tunix==0.1.7",), ("sampling", "sft", "grpo", "ppo", "startup")
    ),
}

SHAPES = {
    "sampling": [{"rows": rows, "prompt": 64, "new": 128} for rows in (16, 64, 1)],
    "sft": [{"rows": 16, "prompt": 64, "new": 64}],
    "grpo": [{"rows": 16, "n": 4, "prompt": 64, "new": 64}],
    "ppo": [{"rows": 16, "prompt": 64, "new": 64, "minibatches": 4}],
    "startup": [{"rows": 16, "n": 4, "prompt": 64, "new": 64}],
}
QUICK = {
    "sampling": [{"rows": 2, "prompt": 8, "new": 4}],
    "sft": [{"rows": 2, "prompt": 4, "new": 4}],
    "grpo": [{"rows": 4, "n": 2, "prompt": 8, "new": 4}],
    "ppo": [{"rows": 4, "prompt": 8, "new": 4, "minibatches": 2}],
    "startup": [{"rows": 4, "n": 2, "prompt": 8, "new": 4}],
}


def interpreter(name: str) -> str:
    """The Python of a peer's virtual environment, which is made if it is not there."""
    if not PEERS[name].packages:
        return sys.executable
    folder = PLACE / Path(PEERS[name].script).stem
    done = folder / ".packages"
    wanted = "\n".join(PEERS[name].packages)
    if not done.is_file() or done.read_text(encoding="utf-8") != wanted:
        print(f"setting up {folder}", file=sys.stderr, flush=True)
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        pip = [folder / "bin/python", "-m", "pip", "install", "--disable-pip-version-check", "-q"]
        subprocess.run([*pip, *PEERS[name].packages], check=True)
        done.write_text(wanted, encoding="utf-8")
    return str(folder / "bin/python")


def write_model(folder: Path) -> None:
    """SmolLM2-135M in float32, with an end that is never drawn, unless it is there already."""
    if folder.is_dir():
        return
    model, params, tokenizer = rl.load_model("smollm2")
    tokenizer.eos_token = NEVER_DRAWN
    with tempfile.TemporaryDirectory(dir=folder.parent) as place:
        whole = Path(place) / folder.name
        write_hf(whole, model.decoder, params, tokenizer)
        whole.rename(folder)


def write_prompts(folder: Path, tokens: int) -> None:
    """prompts.json: 64 texts of exactly ``tokens`` tokens, words of one token each."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = [
        "".join(f" {WORDS[(i + j * j) % len(WORDS)]}" for j in range(tokens)) for i in range(64)
    ]
    assert all(len(tokenizer.encode(text)) == tokens for text in texts)
    (folder / "prompts.json").write_text(json.dumps(texts), encoding="utf-8")


def measure(python: str, script: str, given: Task | None) -> dict[str, Any] | None:
    """What a script prints about a task, run in a process of its own; None if it fails, with its
    last words on standard error."""
    with tempfile.TemporaryDirectory() as cache:
        # Nobody finds compiled programs of an earlier process.
        there = {name: x for name, x in os.environ.items() if name not in HIDDEN}
        there |= {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(HERE.parents[1])}
        words = [] if given is None else [json.dumps(asdict(given))]
        done = subprocess.run(
            [python, HERE / script, *words],
            capture_output=True,
            encoding="utf-8",
            cwd=cache,
            env=there,
        )
    found = [line for line in done.stdout.splitlines() if line.startswith(MARK)]
    if not found:
        last = f"{done.stdout[-2000:]}\n{done.stderr[-6000:]}"
        print(f"{script} failed:\n{last}", file=sys.stderr, flush=True)
        return None
    return json.loads(found[-1].removeprefix(MARK))


def shape_of(given: Task) -> str:
    """A task in words."""
    if given.subject == "sampling":
        return f"sampling {given.rows} × {given.new}, prompt {given.prompt}"
    if given.subject == "sft":
        return f"SFT step of {given.rows} × {given.prompt + given.new}"
    learnt = f"{given.rows // given.n} × {given.n} × ({given.prompt} + {given.new})"
    if given.subject == "startup":
        return f"first step of GRPO, {learnt}, from process start to its end"
    return f"{given.subject.upper()} iteration of {learnt}, minibatches {given.minibatches}"


def _all(runs: list[dict[str, Any]], name: str) -> list[float]:
    """What the runs measured under a name: a number each, or one for every call."""
    return [x for run in runs for x in (run[name] if isinstance(run[name], list) else [run[name]])]


def rows_of(given: Task, found: dict[str, list[dict[str, Any]]]) -> list[str]:
    """Markdown: a table of the task, ratios against jaxrlhf's median."""
    timed = ("whole", "whole_processor") if given.subject == "startup" else ("seconds", "processor")
    ours = {x: statistics.median(_all(found["jaxrlhf"], x)) for x in timed if "jaxrlhf" in found}
    lines = [
        "",
        f"**{shape_of(given)}**",
        "",
        "| | seconds | best | tokens/s | × jaxrlhf | processor s | × jaxrlhf | peak GiB | runs |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    tokens = given.rows * (given.prompt + given.new if given.subject == "sft" else given.new)
    for name, runs in found.items():
        wall, processor = (statistics.median(_all(runs, x)) for x in timed)
        every = _all(runs, timed[0])
        ratios = ["", ""]
        if ours:
            ratios = [f"{wall / ours[timed[0]]:.2f}", f"{processor / ours[timed[1]]:.2f}"]
        peak = max(run["peak_gib"] for run in runs)
        lines.append(
            f"| {name} | {wall:.2f} | {min(every):.2f} | {tokens / wall:.1f} | {ratios[0]} "
            f"| {processor:.1f} | {ratios[1]} | {peak:.2f} | {len(every)} |"
        )
    return lines


def limit_lines(found: dict[str, float], tasks: list[Task], results: list[dict]) -> list[str]:
    """Markdown: what the machine can do, and the share of it that each sampler reaches."""
    lines = [
        "",
        "The machine's own limits, by jax, float32: "
        f"{found['flops'] / 1e9:.0f} GFLOP/s for products of 2,048 rows; for those of 1, 16, 64 "
        "rows with SmolLM2's layers "
        + ", ".join(f"{found[f'flops_layers_{n}'] / 1e9:.0f}" for n in (1, 16, 64))
        + ", with its vocabulary "
        + ", ".join(f"{found[f'flops_{n}'] / 1e9:.0f}" for n in (1, 16, 64))
        + f"; {found['bandwidth'] / 1e9:.1f} GB/s read.",
    ]
    layers, vocabulary = 30 * (576 * 1536 * 3 + 576 * 64 * (2 * 9 + 2 * 3)), 576 * 49152
    for given, result in zip(tasks, results, strict=True):
        if given.subject != "sampling" or f"flops_{given.rows}" not in found:
            continue
        # Products at their rate, or weights at the memory's, whichever takes longer.
        parts = {"flops_layers": layers, "flops": vocabulary}
        products = sum(
            2 * given.rows * size / found[f"{name}_{given.rows}"] for name, size in parts.items()
        )
        step = max(products, 4 * (layers + vocabulary) / found["bandwidth"])
        took = {name: statistics.median(_all(runs, "seconds")) for name, runs in result.items()}
        shares = [f"{name} {given.new * step / spent:.0%}" for name, spent in took.items()]
        lines.append(
            f"A decode step of {given.rows} rows takes at least {1e3 * step:.0f} ms there, by the "
            f"weights' products alone; of a whole call that is {', '.join(shares)}."
        )
    return lines


def header(arguments: argparse.Namespace) -> list[str]:
    """Markdown: when, where, with what, and how busy the machine was."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        named = [
            line for line in info.read_text(encoding="utf-8").splitlines() if "model name" in line
        ]
        cpu = named[0].partition(":")[2].strip() if named else cpu
    words = " ".join(sys.argv[1:])
    pinned = sorted({p for peer in PEERS.values() for p in peer.packages if "==" in p})
    return [
        f"## Beside its peers, {datetime.date.today()}",
        "",
        f"`make benchmark ARGS={words!r}`: {os.cpu_count()} cores ({cpu}), Python "
        f"{platform.python_version()}, jax {jax.__version__}, {', '.join(pinned)}. Interleaved, "
        f"{arguments.rounds} rounds of {arguments.repeats} calls, medians; processor time is user "
        "and system of the process, peak memory with loading and compiling. Load average of the "
        f"minute before: {os.getloadavg()[0]:.1f}. Ratios above 1: slower than jaxrlhf.",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--subjects", nargs="*", choices=[*SHAPES], default=[*SHAPES])
    parser.add_argument("--peers", nargs="*", choices=[*PEERS], default=[*PEERS])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=2, help="timed calls of each process")
    parser.add_argument("--quick", action="store_true", help="smallest shapes, one round")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.rounds = arguments.repeats = 1
    lines = header(arguments)
    pythons = {name: interpreter(name) for name in arguments.peers}
    folder = PLACE / "smollm2"
    write_model(folder)
    shapes = QUICK if arguments.quick else SHAPES
    whole = {"n": 1, "minibatches": 1, "repeats": arguments.repeats, "folder": str(folder)}
    tasks = [
        Task(**{**whole, "subject": subject, "began": 0.0, **shape})
        for subject in arguments.subjects
        for shape in shapes[subject]
    ]
    limits = measure(sys.executable, "limits.py", None)
    results: list[dict[str, list[dict[str, Any]]]] = [{} for _ in tasks]
    for turn in range(arguments.rounds):
        for given, result in zip(tasks, results, strict=True):
            # A row of SFT is a text as long as prompt and answer, its end included.
            write_prompts(folder, given.prompt + (given.new - 1) * (given.subject == "sft"))
            for name in arguments.peers:
                if given.subject not in PEERS[name].subjects:
                    continue
                now = Task(**{**asdict(given), "began": time.time()})
                found = measure(pythons[name], PEERS[name].script, now)
                print(f"round {turn + 1}: {shape_of(given)}: {name}: {found}", file=sys.stderr)
                if found is not None:
                    result.setdefault(name, []).append(found)
    for given, result in zip(tasks, results, strict=True):
        if result:
            lines += rows_of(given, result)
    if limits is not None:
        lines += limit_lines(limits, tasks, results)
    print("\n".join(lines))


if __name__ == "__main__":
    main()
