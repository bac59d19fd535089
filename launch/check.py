"""Whether a run's config loads, asked before anything is sent or paid for.

    python launch/check.py CONFIG [--dotted.key value …]

CONFIG is looked for below the repository, from where the hosts run it. Exit status 0 if it loads
and its fields agree, 2 with one line if not. What cannot be told here is said on stderr, and is no
error: a path that only the hosts have, or a Python without pydantic and tyro, which read configs.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def main(words: list[str]) -> int:
    name, changes = words[0], words[1:]
    path = Path(name)
    if path.is_absolute():
        print(f"{name}: not checked: it lies on the hosts", file=sys.stderr)
        return 0
    packaged = ":" in name  # jaxrlhf:configs/…
    if not packaged and not (ROOT / path).is_file():
        print(f"error: {name}: no such file in {ROOT}, of which hosts get a copy", file=sys.stderr)
        return 2
    sys.path.insert(0, str(ROOT))
    try:
        from jaxrlhf.config import check, load  # noqa: PLC0415 (the repository's, not another)
        from jaxrlhf.core.errors import InputError  # noqa: PLC0415
    except ModuleNotFoundError as error:
        said = f"{name}: not checked: {sys.executable} has no {error.name}"
        print(f"{said}: PYTHON=.venv/bin/python has, after make setup", file=sys.stderr)
        return 0
    try:
        check(load(name if packaged else ROOT / path, changes))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
