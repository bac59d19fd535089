"""Keep the flags that the installed XLA knows: it aborts the process on any other.

    python launch/flags.py xla --xla_gpu_enable_latency_hiding_scheduler=true …
    python launch/flags.py libtpu --xla_tpu_enable_async_collective_fusion=true …

Prints those that stay, on one line; the others are named on stderr. A flag is known where its name
stands, ended by a zero byte, in each library that reads the variable: jaxlib and the GPU plugins
read XLA_FLAGS, libtpu reads LIBTPU_INIT_ARGS. Nothing of JAX is imported, no device is touched.
"""

import mmap
import sys
from importlib.util import find_spec
from pathlib import Path


def libraries(kind: str) -> list[Path]:
    """The shared libraries that parse the flags of ``kind``, xla or libtpu."""
    patterns = {
        "xla": [("jaxlib", "libjax_common.so"), ("jax_plugins", "xla_*/xla_*plugin.so")],
        "libtpu": [("libtpu", "libtpu.so")],
    }[kind]
    found = []
    for package, pattern in patterns:
        spec = find_spec(package)
        for folder in (spec.submodule_search_locations or []) if spec else []:
            found += sorted(Path(folder).glob(pattern))
    return found


def known(flag: str, library: Path) -> bool:
    """Whether a library has a flag of this name."""
    name = flag.lstrip("-").partition("=")[0]
    with library.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return data.find(name.encode() + b"\0") >= 0


def main(words: list[str]) -> int:
    if not words or words[0] not in ("xla", "libtpu"):
        print("usage: flags.py xla|libtpu FLAG…", file=sys.stderr)
        return 2
    kind, flags = words[0], words[1:]
    paths = libraries(kind)
    if not paths:
        package = {"xla": "jaxlib", "libtpu": "libtpu"}[kind]
        print(f"error: {package} is not installed for {sys.executable}", file=sys.stderr)
        return 1
    kept = []
    for flag in flags:
        strangers = [path.name for path in paths if not known(flag, path)]
        if strangers:
            print(f"left out, unknown to {', '.join(strangers)}: {flag}", file=sys.stderr)
        else:
            kept.append(flag)
    print(*kept)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
