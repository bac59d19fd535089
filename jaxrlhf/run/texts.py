"""The completions of a run as its page shows them: chats as turns, and one prompt's answers over
time side by side."""

import re
from collections.abc import Mapping, Sequence
from itertools import groupby, islice

from jaxrlhf.run.display import number
from jaxrlhf.run.folder import Record, RunFiles
from jaxrlhf.run.page import Answer, Sample, Section, Turn, cell

SHOWN, SHOWN_COMPARED, SHOWN_TRAINING = 24, 12, 12
"""Prompts whose completions are shown: held out, of several runs, and of the iterations."""

FIRST = 5
"""Prompts of a section that a reader sees at once; the others open, or are found by a search."""

COLUMNS = 5
"""Evaluations whose completions stand side by side: first and last, and some between."""

LONGEST, SYSTEM = 4000, 400
"""Characters that are shown of a text, and of what a chat tells the model first."""

MARKUP = (
    r"<\|im_start\|>(?P<a>\w+)\n(?P<A>.*?)(?:<\|im_end\|>|\Z)",
    r"<\|start_header_id\|>(?P<b>\w+)<\|end_header_id\|>\n\n(?P<B>.*?)(?:<\|eot_id\|>|\Z)",
    r"<start_of_turn>(?P<c>\w+)\n(?P<C>.*?)(?:<end_of_turn>|\Z)",
    r"<\|(?P<d>system|user|assistant)\|>\n(?P<D>.*?)(?:<\|end\|>|</s>|(?=<\|)|\Z)",
)
"""How chat templates write a turn: ChatML, Llama 3, Gemma, and Phi's and Zephyr's."""

_TURN = re.compile("|".join(MARKUP), re.DOTALL)


def turns(text: str) -> list[Turn]:
    """A rendered chat → its turns; a text in which no template is recognised is one turn.

    A turn without text at the end, where the answer is to stand, is left out.
    """
    found = [Turn(*(x for x in match.groups() if x is not None)) for match in _TURN.finditer(text)]
    spoken = [Turn(role, said.strip()) for role, said in found]
    return [turn for turn in spoken if turn.text] or [Turn("", text)]


def question(row: Record) -> list[Turn]:
    """What a completion answers: the turns of its chat, instructions before them cut short; what
    the user said last, where no turns are recognised; else the prompt."""
    found = turns(cut(cell(row.get("prompt", ""))))
    if "user" in row and not found[0].role:
        return [Turn("user", cut(cell(row["user"])))]
    return [x._replace(text=cut(x.text, SYSTEM)) if x.role == "system" else x for x in found]


def held_out(run: RunFiles) -> Section:
    """What was said to held-out prompts, at some of the evaluations side by side."""
    rows = [row for row in run.samples if row.get("split") == "eval"]
    steps = spaced(sorted({row["step"] for row in rows}))
    columns = [first_of(rows, step) for step in steps]
    # A prompt that one evaluation lacks has been cut off with the run.
    prompts = [p for p in (columns[0] if columns else {}) if all(p in rows for rows in columns)]
    labels = [f"step {step}" for step in steps]
    samples = [
        Sample(
            question(columns[-1][p]),
            [answer(x, c[p]) for x, c in zip(labels, columns, strict=True)],
        )
        for p in prompts[:SHOWN]
    ]
    lines = []
    if len(prompts) > len(samples):
        lines = [f"The first {len(samples)} of {len(prompts)} prompts, one completion of each."]
    return Section("Completions of held-out prompts", lines, samples=samples)


def in_training(run: RunFiles) -> Section:
    """The newest completions of the iterations, newest first, those of one prompt together."""
    rows = [row for row in run.samples if row.get("split") != "eval"]
    groups = groupby(reversed(rows), lambda row: (row["step"], cell(row.get("prompt", ""))))
    alike = (list(islice(same, COLUMNS)) for _, same in islice(groups, SHOWN_TRAINING))
    samples = [
        Sample(question(same[0]), [answer(f"step {row['step']}", row) for row in same])
        for same in alike
    ]
    return Section("Newest completions in training", samples=samples)


def compared(named: Mapping[str, RunFiles]) -> Section:
    """What several runs say last to the held-out prompts that they share."""
    last = []
    for run in named.values():
        rows = [row for row in run.samples if row.get("split") == "eval"]
        last.append(first_of(rows, max((row["step"] for row in rows), default=0)))
    shared = [prompt for prompt in last[0] if all(prompt in rows for rows in last)]
    samples = [
        Sample(
            question(last[0][prompt]),
            [answer(name, rows[prompt]) for name, rows in zip(named, last, strict=True)],
        )
        for prompt in shared[:SHOWN_COMPARED]
    ]
    return Section("Completions of held-out prompts, after training", samples=samples)


def spaced(steps: Sequence[int]) -> list[int]:
    """At most ``COLUMNS`` of them: first and last, and what lies about evenly between."""
    if len(steps) <= COLUMNS:
        return list(steps)
    return [steps[round(i * (len(steps) - 1) / (COLUMNS - 1))] for i in range(COLUMNS)]


def first_of(rows: Sequence[Record], step: int) -> dict[str, Record]:
    """Of an evaluation, each prompt's first completion."""
    found: dict[str, Record] = {}
    for row in rows:
        if row["step"] == step:
            # Each draw has the same key in every evaluation, so first draws go together.
            found.setdefault(cell(row.get("prompt")), row)
    return found


def answer(label: str, row: Record) -> Answer:
    """A completion, and what it was found to be worth."""
    known = [name for name in ("proxy", "gold", "reward") if row.get(name) is not None]
    scores = ", ".join(f"{name} {number(row[name])}" for name in known)
    return Answer(label, cut(cell(row.get("completion", ""))), scores)


def cut(text: str, most: int = LONGEST) -> str:
    """A text, without its middle if it is longer than ``most`` characters."""
    half = most // 2
    return text if len(text) <= most else f"{text[:half]} … {text[-half:]}"
