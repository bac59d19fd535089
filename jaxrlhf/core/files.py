"""Files that are whole at any time, and places that cannot be written, named."""

import errno
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from jaxrlhf.core.errors import InputError


def write_atomic(path: str | Path, text: str) -> None:
    """Replace a file by ``text`` (UTF-8): a reader, or a kill, finds the old or the new content.

    Raises:
      InputError: it cannot be written; the old content stays.
    """
    path = Path(path)
    # Beside it: a rename is atomic only within one file system.
    part = path.with_name(path.name + ".part")
    with writing(path):
        try:
            with open(part, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                # Else, after a power cut, the rename may be on disk and the text not.
                os.fsync(file.fileno())
            os.replace(part, path)
        except OSError:
            # On a full disk, half a file is room for something else.
            with suppress(OSError):
                part.unlink()
            raise


@contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """What the system refuses inside is an InputError that names ``path`` and the reason."""
    try:
        yield
    except OSError as error:
        raise InputError(unwritable(path, error)) from error


def unwritable(path: str | Path, error: OSError) -> str:
    """What could not be written, why, and the remedy; of a full disk, how much of it is free."""
    reason, remedy = error.strerror or str(error), "give another path"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        reason, remedy = f"{reason}; {free(path)}", "make room and start again"
    return f"{path}: cannot be written ({reason}): {remedy}"


def free(path: str | Path) -> str:
    """How much of the disk that ``path`` is to lie on is free, as a text: MiB, and files."""
    path = Path(path).absolute()
    there = next((x for x in (path, *path.parents) if x.exists()), path)
    try:
        disk = os.statvfs(there)
    except OSError as error:
        return f"how much is free there cannot be told: {error.strerror}"
    space = f"{disk.f_bavail * disk.f_frsize / 2**20:.1f} MiB"
    # Some file systems have no limit on files, and say 0 of 0.
    files = f" and {disk.f_favail} more files" if disk.f_files else ""
    return f"{space}{files} are free there"


def is_url(path: str | Path) -> bool:
    """Whether a path is a URL, gs://bucket/folder, say; a Path has lost one of its slashes."""
    return re.match(r"[A-Za-z][\w+.-]+:/", str(path)) is not None


def below(folder: str, name: str) -> str:
    """The path, or the URL, of what is called ``name`` in a folder."""
    return f"{folder.rstrip('/')}/{name}" if is_url(folder) else str(Path(folder) / name)


def check_no_url(field: str, path: str | Path) -> None:
    """Refuse a URL where a folder or file of this machine is wanted.

    Raises:
      InputError: it is one; the message says what to do.
    """
    if is_url(path):
        raise InputError(
            f"{field}={path}: a URL, and here only a file or folder of this machine will do: mount "
            "the bucket (gcsfuse, mount-s3) and give the folder, or copy it afterwards (gcloud "
            "storage cp -r, aws s3 cp --recursive)"
        )


def check_file(path: str | Path) -> None:
    """See that a file can be written, before the work that it is to hold; makes its folder.

    Raises:
      InputError: it cannot.
    """
    check_no_url("output", path)
    if Path(path).is_dir():
        raise InputError(f"{path}: cannot be written (it is a folder): give the path of a file")
    check_folder(Path(path).parent)


def check_folder(folder: Path) -> None:
    """See that files can be written into a folder, which is made if it is not there.

    Raises:
      InputError: they cannot.
    """
    check_no_url("output", folder)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        # By making a file: permissions do not tell of a read-only mount.
        tempfile.TemporaryFile(dir=folder).close()
