"""Stores for tests: one that several processes see, with what stores of objects lack refused; and a
fake of Google's, on the loopback."""

import os
from contextlib import contextmanager

import fsspec
import pytest
from fsspec.implementations.local import LocalFileSystem
from loopback import free_port


class Shared(LocalFileSystem):
    """shared://… in the folder that SHARED names: no rename, no append, no folders to be made."""

    protocol = "shared"

    def __init__(self, **given):
        super().__init__(auto_mkdir=True, **given)

    @classmethod
    def _strip_protocol(cls, path):
        path = str(path).rstrip("/")
        inside = path.removeprefix("shared://")
        return path if inside == path else f"{os.environ['SHARED']}/{inside}"

    def mv(self, *_, **__):
        raise NotImplementedError("a store of objects has no rename")

    def _open(self, path, mode="rb", **given):
        assert "a" not in mode
        return super()._open(path, mode, **given)


fsspec.register_implementation("shared", Shared, clobber=True)


@contextmanager
def google(monkeypatch):
    """gs://bucket, empty, by gcsfs over HTTP; skips where the packages are not there."""
    server = pytest.importorskip("gcp_storage_emulator.server")
    # Else it asks by gRPC, which the fake does not speak, what kind of a bucket it is.
    monkeypatch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    pytest.importorskip("gcsfs")
    monkeypatch.setitem(fsspec.config.conf, "gs", {"token": "anon", "project": "p"})
    port = free_port()
    fake = server.create_server("127.0.0.1", port, in_memory=True, default_bucket="bucket")
    fake.start()
    try:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{port}")
        yield
    finally:
        fake.stop()
