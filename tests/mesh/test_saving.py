"""What orbax writes beside our one warning is kept from the terminal."""

import logging
from types import SimpleNamespace

from jaxrlhf.mesh import saving
from jaxrlhf.mesh.saving import _not_left_over, _not_orbax_future


def test_a_failed_save_is_one_line(caplog):
    """What orbax and tensorstore say of the writes that were under way beside it is left out."""
    caplog.set_level(logging.DEBUG)
    for name in ("ocdbt at run/checkpoints/3.orbax-checkpoint-tmp", "a reward of mine"):
        text = f"Future exception was never retrieved: {name}"
        record = logging.LogRecord("asyncio", logging.ERROR, "x", 1, text, None, None)
        assert _not_orbax_future(record) == ("reward" in name)


def test_a_failed_read_is_one_line(monkeypatch):
    """What was under way beside it says 4 kB for each array, which fills a pipe."""
    said = []
    monkeypatch.setattr(saving, "_hooks", [said.append])
    for file in ("site-packages/orbax/x.py", "mine.py"):
        names = {}
        exec(compile("async def read(): pass", file, "exec"), names)
        left = names["read"]()
        error = Exception("Encountered error while reading array index")
        _not_left_over(SimpleNamespace(exc_type=Exception, exc_value=error, object=left))
        left.close()
        assert bool(said) == (file == "mine.py")
