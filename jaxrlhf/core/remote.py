"""Files by URL (gs://, s3://, file://, whatever fsspec reads), brought here before they are used.

A file, or some of a folder's, is copied once into ``~/.cache/jaxrlhf/urls``, under its URL and what
the store says of its contents (etag, size, time): another version is another copy, as in the cache
of the Hugging Face hub, and old ones stay until somebody removes them. Of several processes on one
host, the first copies and the others wait for it. Whoever reads then asks ``here`` for the copy,
which asks no network; configs and messages keep the URL.
"""

import fcntl
import hashlib
import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from jaxrlhf.core.errors import InputError, refused, to_install
from jaxrlhf.core.files import check_file, is_url, write_atomic, writing
from jaxrlhf.core.shown import one_line

EXTRAS = {"gs": "gcs", "gcs": "gcs", "s3": "s3", "s3a": "s3"}
"""The extra that brings what fsspec reads a scheme with."""

CONTENT = (
    "etag", "ETag", "md5Hash", "generation", "mtime", "updated", "LastModified", "last_modified",
    "created", "size",
)  # fmt: skip
"""What stores say of a file that changes with its contents; none says all of it."""

_here: dict[str, str] = {}
"""The copy of each URL that this process has asked for."""


def check_url(field: str, path: str | Path) -> None:
    """Refuse a URL that cannot be read here, before anything starts; a path passes.

    Raises:
      InputError: fsspec knows no such scheme, or its package is not installed.
    """
    if is_url(path):
        _class_of(field, _url(path))


def store(field: str, url: str | Path) -> tuple[Any, str]:
    """What fsspec reads and writes a URL with, and the URL's path in it.

    Args:
      field: that names the URL, for the message.

    Raises:
      InputError: as ``check_url``; or it cannot be opened, as without credentials.
    """
    from fsspec.core import url_to_fs  # noqa: PLC0415 (0.2 s)

    url = _url(url)
    _class_of(field, url)
    with _asking(field, url):
        # Listings that fsspec remembers would hide what other processes write.
        return url_to_fs(url, use_listings_cache=False)


def here(path: str) -> str:
    """The copy of a URL that ``fetch`` has brought; ``path`` itself if it is no URL, or nobody
    has. Asks no network."""
    if not is_url(path):
        return path
    if path not in _here:
        note = _place(path) / "newest"
        if not note.is_file():
            return path
        _here[path] = str(_place(path) / note.read_text(encoding="utf-8").strip())
    return _here[path]


def fetch(
    field: str,
    url: str,
    choose: Callable[[list[str]], Iterable[str]] = lambda names: names,
    part: str = "",
) -> str:
    """Bring a file, or the files of a folder; where the copy lies, as ``here`` says from now on.

    Args:
      field: that names the URL, for messages.
      choose: of the names of a folder's files, relative to it, those that are wanted.
      part: what is chosen, if that is less than what others want of it: it has a copy of its own,
        and ``here`` does not tell of it.

    Raises:
      InputError: there is nothing, or it cannot be read.
    """
    fs, root = store(field, url)
    with _asking(field, url):
        found = fs.find(root, detail=True)
        # Some stores find a file inside of itself, others nothing.
        if not found and fs.isfile(root):
            found = {root: fs.info(root)}
    if not found:
        raise InputError(f"{field}={url}: nothing is there: check it, and who may read it")
    single = list(found) == [root]
    files = {_relative(name, root): info for name, info in found.items()}
    wanted = files if single else {name: files[name] for name in choose(sorted(files))}
    if not wanted:
        raise InputError(f"{field}={url}: holds none of the files that are wanted: check it")
    # A key of a store is any text; here it is a path.
    if odd := [name for name in wanted if ".." in name.split("/") or name.startswith("/")]:
        raise InputError(f"{field}={url}: {odd[0]!r}: no name of a file inside of it: rename it")
    place = _place(f"{url}#{part}" if part else url)
    with writing(place):
        place.mkdir(parents=True, exist_ok=True)
    version = _version(wanted)
    with _alone(place):
        if not (place / version).is_dir():
            _copy(field, url, fs, root, wanted, place / version)
        path = f"{version}/{next(iter(wanted))}" if single else version
        write_atomic(place / "newest", path)
    if not part:
        _here[url] = str(place / path)
    return str(place / path)


def scratch(output: str) -> Path:
    """The folder that a run writes into: ``output``, or one of this machine's that stands for it
    where it is a URL (``run.mirror``)."""
    if not is_url(output):
        return Path(output)
    name = output.rstrip("/").rpartition("/")[2]
    return Path.home() / ".cache" / "jaxrlhf" / "runs" / f"{name}-{_place(output).name}"


WHOLE = ".whole"
"""What the name of a step's mark ends in, beside the steps of a run that is copied elsewhere: its
last file to come, and the first to go."""


def marked(names: Iterable[str]) -> dict[int, list[str]]:
    """Of the names of a run's files elsewhere, those of each step that is whole there."""
    names = set(names)
    found: dict[int, list[str]] = {}
    for name in sorted(names):
        if match := re.fullmatch(r"checkpoints/(0|[1-9][0-9]*)/.+", name):
            found.setdefault(int(match[1]), []).append(name)
    return {step: files for step, files in found.items() if f"checkpoints/{step}{WHOLE}" in names}


def newest_of(names: Iterable[str]) -> list[str]:
    """Of the names of a run's files elsewhere, those of its newest whole step; of a folder that was
    copied by hand, which has no marks, of its newest."""
    names = list(names)
    steps = marked(names)
    if not steps:
        by_hand = {match[1] for x in names if (match := re.match(r"checkpoints/(\d+)/", x))}
        steps = marked([*names, *(f"checkpoints/{step}{WHOLE}" for step in by_hand)])
    return steps[max(steps)] if steps else []


def read_text(field: str, url: str) -> str:
    """The text of a small file by URL; "" if it is not there.

    Raises:
      InputError: it cannot be read.
    """
    fs, path = store(field, url)
    with _asking(field, url):
        return fs.cat_file(path).decode("utf-8", "replace") if fs.isfile(path) else ""


def check_target(field: str, path: str) -> None:
    """See that a file can be written, to a URL too, before the work that it is to hold.

    Raises:
      InputError: it cannot.
    """
    if not is_url(path):
        check_file(path)
        return
    fs, target = store(field, path)
    # By writing a file: who may read a store need not be one who may write there.
    probe = f"{target.rpartition('/')[0]}/.writable"
    with refused(f"{field}={path}: cannot be written", "give another place"):
        put_bytes(fs, probe, b"")
    with suppress(Exception):  # who may write need not be one who may delete
        fs.rm_file(probe)


def write_text(field: str, path: str, text: str) -> None:
    """Write a small file, to a URL too.

    Raises:
      InputError: it cannot be written; what was to go to a URL is then in a file of this machine.
    """
    if not is_url(path):
        write_atomic(path, text)
        return
    try:
        fs, target = store(field, path)
        put_bytes(fs, target, text.encode())
    # Whatever the store's library raises.
    except Exception as error:
        kept = Path(tempfile.mkdtemp(prefix="jaxrlhf-")) / path.rpartition("/")[2]
        write_atomic(kept, text)
        raise InputError(
            f"{field}={path}: could not be written ({one_line(error)}): {kept} has it: copy it "
            "there"
        ) from None


def put_bytes(fs: Any, target: str, content: bytes) -> None:
    """Write a small file into a store, in one piece; its folder is made where there are any."""
    try:
        fs.pipe_file(target, content)
    except FileNotFoundError:
        fs.makedirs(target.rpartition("/")[0], exist_ok=True)
        fs.pipe_file(target, content)


def put_whole(fs: Any, source: str | Path, target: str) -> None:
    """Write a file of this machine into a store; its folder there is made where there are any."""
    try:
        fs.put_file(str(source), target)
    except FileNotFoundError:
        fs.makedirs(target.rpartition("/")[0], exist_ok=True)
        fs.put_file(str(source), target)


def get_whole(fs: Any, source: str, target: Path, size: int | None = None) -> None:
    """Copy a file out of a store; under its name it is whole.

    Raises:
      OSError: it has another size than it should.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(target.name + ".part")
    fs.get_file(source, str(part))
    if size is not None and part.stat().st_size != size:
        raise OSError(f"{source}: {part.stat().st_size} bytes came of {size}")
    os.replace(part, target)


def _copy(field: str, url: str, fs: Any, root: str, wanted: Mapping[str, Any], place: Path) -> None:
    """Copy files, one after the other; what a killed copy has left whole is not copied again."""
    part, began = place.with_name(place.name + ".part"), time.perf_counter()
    with _asking(field, url):
        for name, info in wanted.items():
            size, target = info.get("size"), part / name
            if not (target.is_file() and target.stat().st_size == size):
                source = info["name"] if len(wanted) == 1 else f"{root.rstrip('/')}/{name}"
                get_whole(fs, source, target, size)
    os.replace(part, place)
    mib = sum(x.stat().st_size for x in place.rglob("*") if x.is_file()) / 2**20
    spent = time.perf_counter() - began
    print(f"{field}: {url}: {mib:.1f} MiB in {spent:.1f} s, now in {place}", file=sys.stderr)


def _class_of(field: str, url: str) -> Any:
    from fsspec import get_filesystem_class  # noqa: PLC0415 (0.2 s)

    scheme = url.partition("://")[0]
    try:
        return get_filesystem_class(scheme)
    except ImportError as error:
        # What is missing, fsspec says: "Install s3fs to access S3".
        remedy = to_install(EXTRAS[scheme]) if scheme in EXTRAS else "install it"
        raise InputError(f"{field}={url}: needs a package ({one_line(error)}): {remedy}") from None
    except ValueError:
        raise InputError(
            f"{field}={url}: nothing reads {scheme}://…: give gs://…, s3://…, another scheme of "
            "fsspec, or a path of this machine"
        ) from None


@contextmanager
def _asking(field: str, url: str) -> Iterator[None]:
    with refused(f"{field}={url}: cannot be read", "check it, the network, and who may read it"):
        yield


@contextmanager
def _alone(place: Path) -> Iterator[None]:
    """Of the processes on this host, one is inside at a time."""
    with writing(place), open(place / ".lock", "ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _place(url: str) -> Path:
    name = hashlib.sha256(url.encode()).hexdigest()[:16]
    return Path.home() / ".cache" / "jaxrlhf" / "urls" / name


def _version(files: Mapping[str, Mapping[str, Any]]) -> str:
    said = {
        name: {key: str(info[key]) for key in CONTENT if info.get(key) is not None}
        for name, info in files.items()
    }
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:16]


def _relative(name: str, root: str) -> str:
    return name.rpartition("/")[2] if name == root else name[len(root.rstrip("/")) + 1 :]


def _url(path: str | Path) -> str:
    """A URL as it was written: a Path has lost one of its slashes."""
    return re.sub(r":/+", lambda m: m[0] if len(m[0]) > 2 else "://", str(path), count=1)
