"""What memory this process has, and had at most, as Linux counts it."""

import contextlib
from pathlib import Path


def occupied(kind):
    """Bytes that this process has in memory (VmRSS) or had at most (VmHWM); 0 if nobody says."""
    path = Path("/proc/self/status")
    lines = path.read_text(encoding="ascii").splitlines() if path.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(kind)), 0)


def forget_peak():
    """The most so far (VmHWM) begins again at what there is, where that is allowed."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
