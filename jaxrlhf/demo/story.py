"""What a demo shows at its end: the same held-out prompts before and after, and the figures."""

import json
from io import StringIO
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

SHOWN = 6


def before_and_after(folder: Path, summary: dict[str, Any], width: int = 100) -> str:
    """Completions of the first held-out prompts from both ends of a run, and its main figures."""
    rows = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    rows = [row for row in rows if row.get("split") == "eval"]
    last = max(row["step"] for row in rows)
    ends = [{}, {}]
    for row in rows:
        if row["step"] in (0, last):
            ends[int(row["step"] != 0)].setdefault(row["prompt"], row)
    table = Table(title="Held-out prompts, the same draws before and after", show_lines=True)
    for name in ("prompt", "before", "after"):
        table.add_column(name, ratio=1)
    for prompt in list(ends[0])[:SHOWN]:
        cells = [f"{end[prompt]['completion']} ({end[prompt]['gold']:+.2f})" for end in ends]
        table.add_row(*(Text(text) for text in (prompt, *cells)))
    out = StringIO()
    console = Console(file=out, width=width, color_system=None)
    console.print(table)
    for line in figures(summary):
        console.print(Text(line))
    return out.getvalue()


def figures(summary: dict[str, Any]) -> list[str]:
    """The main figures of a demo, a line each."""
    s = summary
    return [
        f"gold measure   {s['gold_before']:.3f} → {s['gold_after']:.3f}  "
        f"(rise {s['gold_rise']:.3f} ± {s['gold_rise_ci']:.3f})",
        f"reward model   {s['proxy_before']:.3f} → {s['proxy_after']:.3f}  "
        f"(accuracy on held-out pairs {s['reward_model_accuracy']:.3f})",
        f"KL(π‖π_ref)    {s['kl_nats']:.2f} nats a sequence",
        f"length         {s['length_before']:.1f} → {s['length_after']:.1f} tokens",
        f"distinct-2     {s['distinct_2_before']:.3f} → {s['distinct_2_after']:.3f}",
        f"peak memory    {s['peak_memory_gib']:.2f} GiB     time {s['minutes']:.1f} min",
    ]
