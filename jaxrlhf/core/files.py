"""Files that are whole at any time, and places that cannot be written, named."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from jaxrlhf.core.errors import InputError


def write_atomic(path: str | Path, text: str) -> None:
    """Replace a file by ``text`` (UTF-8): a reader, or a kill, finds the old or the new content."""
    path = Path(path)
    # Beside it: a rename is atomic only within one file system.
    part = path.with_name(path.name + ".part")
    with open(part, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        # Else, after a power cut, the rename may be on disk and the text not.
        os.fsync(file.fileno())
    os.replace(part, path)


@contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """What the system refuses inside is an InputError that names ``path`` and the reason."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise InputError(f"{path}: cannot be written ({reason}): give another path") from error


def check_file(path: str | Path) -> None:
    """See that a file can be written, before the work that it is to hold; makes its folder.

    Raises:
      InputError: it cannot.
    """
    if Path(path).is_dir():
        raise InputError(f"{path}: cannot be written (it is a folder): give the path of a file")
    check_folder(Path(path).parent)


def check_folder(folder: Path) -> None:
    """See that files can be written into a folder, which is made if it is not there.

    Raises:
      InputError: they cannot.
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        # By making a file: permissions do not tell of a read-only mount.
        tempfile.TemporaryFile(dir=folder).close()
