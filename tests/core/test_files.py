"""Files are whole at any time; places that cannot be written are named before the work."""

import errno
import os

import pytest

from jaxrlhf.core.errors import InputError
from jaxrlhf.core.files import check_file, free, write_atomic, writing


def test_write_atomic_replaces(tmp_path):
    write_atomic(tmp_path / "x", "old")
    write_atomic(tmp_path / "x", "é")
    assert (tmp_path / "x").read_text("utf-8") == "é"
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def full(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_write_atomic_on_a_full_disk_keeps_the_old_and_says_how_much_is_free(tmp_path, monkeypatch):
    write_atomic(tmp_path / "x", "old")
    monkeypatch.setattr(os, "fsync", full)
    said = r"x: cannot be written \(No space left .*; \d+\.\d MiB.* are free there\): make room"
    with pytest.raises(InputError, match=said):
        write_atomic(tmp_path / "x", "new")
    assert (tmp_path / "x").read_text("utf-8") == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_free_is_of_the_nearest_folder_that_is_there(tmp_path):
    assert free(tmp_path / "a/b") == free(tmp_path)
    assert free("/proc/version").startswith("0.0 MiB")


def test_check_file_makes_its_folder_or_names_what_cannot_be_written(tmp_path):
    check_file(tmp_path / "a/b/x")
    assert not list((tmp_path / "a/b").iterdir())
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"file/a: cannot be written \(Not a directory\): give"):
        check_file(tmp_path / "file/a/x")
    with pytest.raises(InputError, match=r"cannot be written \(it is a folder\)"):
        check_file(tmp_path)
    with pytest.raises(InputError, match=r"x: cannot be written \(No space left"), writing("x"):
        full()
