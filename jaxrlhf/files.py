"""Files that are whole at any time."""

import os
from pathlib import Path


def write_atomic(path: str | Path, text: str) -> None:
    """Replace a file by ``text`` (UTF-8): a reader, or a kill, finds the old or the new content."""
    path = Path(path)
    part = path.with_name(path.name + ".part")
    with open(part, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)
