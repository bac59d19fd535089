"""The layering of the package and the size of its parts, read from the source."""

import ast
import graphlib
import importlib
from collections import Counter
from pathlib import Path

import jaxrlhf as rl

ROOT = Path(__file__).parents[1] / "jaxrlhf"
ROOMS = (
    "core", "config", "mesh", "algorithms", "models", "steps",
    "data", "rewards", "run", "study", "apps",
)  # fmt: skip
"""From the ground up: a module imports its own room and those before it."""

EXTRAS = {"vader", "math_verify", "reasoning_gym", "datasets", "qwix"}
"""Optional dependencies."""

LATE = {"fsspec", "scipy"}
"""Slow to import, and not wanted before a first step; functions may import these and EXTRAS."""


def name_of(path):
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in sorted(ROOT.rglob("*.py"))}
MODULES = {name_of(path): tree for path, tree in TREES.items()}
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def imports(node):
    """(line, module) of every import below ``node``; ``from package import x`` as package.x."""
    for child in ast.walk(node):
        if isinstance(child, ast.Import):
            yield from ((child.lineno, alias.name) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, f"line {child.lineno}: a relative import"
            yield from ((child.lineno, f"{child.module}.{alias.name}") for alias in child.names)


def own(node):
    """The modules of this package that are imported below ``node``."""
    for _, name in imports(node):
        if name.split(".")[0] == "jaxrlhf" and name != "jaxrlhf.__version__":
            while name not in MODULES:
                name = name.rpartition(".")[0]
            yield name


def room(module):
    """The place in ROOMS of the room that a module belongs to; the package itself is on top."""
    parts = module.split(".")
    return ROOMS.index(parts[1]) if parts[1:2] and parts[1] != "__main__" else len(ROOMS)


def functions():
    for path, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, FUNCTIONS):
                yield path, node


def test_imports_point_down():
    wrong = [
        f"{module} imports {target}"
        for module, tree in MODULES.items()
        for target in own(tree)
        if room(target) > room(module)
    ]
    assert wrong == []


def test_imports_have_no_cycle():
    graph = {module: set(own(tree)) - {module} for module, tree in MODULES.items()}
    graphlib.TopologicalSorter(graph).prepare()


def test_imports_stand_at_the_top():
    wrong = {
        f"{path.relative_to(ROOT)}:{line}: {name}"
        for path, function in functions()
        if path.name not in ("on_runs.py", "others.py")
        for line, name in imports(function)
        if name.split(".")[0] not in EXTRAS | LATE
    }
    assert wrong == set()


def test_nnx_stays_in_models():
    wrong = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path, tree in TREES.items()
        if path.parent.name != "models"
        for node in ast.walk(tree)
        if "nnx" in (getattr(node, "id", ""), getattr(node, "attr", ""), getattr(node, "name", ""))
    ]
    assert wrong == []


def test_config_does_not_import_jax():
    wrong = [
        f"{module}: {name}"
        for module, tree in MODULES.items()
        if module.startswith(("jaxrlhf.config", "jaxrlhf.core.errors", "jaxrlhf.core.files"))
        for _, name in imports(tree)
        if name.split(".")[0] in ("jax", "jaxlib", "flax", "optax", "chex", "orbax")
    ]
    assert wrong == []


def test_files_are_short():
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in TREES}
    assert {str(path.relative_to(ROOT)): n for path, n in lengths.items() if n > 500} == {}


def test_files_of_tests_have_names_of_their_own():
    """They are imported by their names alone: of two, a run over all of them would lose one."""
    names = Counter(path.name for path in Path(__file__).parent.rglob("test_*.py"))
    assert [name for name, count in names.items() if count > 1] == []


def test_functions_are_short():
    long = {
        f"{path.relative_to(ROOT)}:{node.lineno} {node.name}": lines
        for path, node in functions()
        if (lines := node.end_lineno - node.lineno + 1) > 60
    }
    assert long == {}


def test_classes_are_one_level_deep():
    classes = [node for tree in TREES.values() for node in ast.walk(tree)]
    classes = [node for node in classes if isinstance(node, ast.ClassDef)]
    names = {node.name for node in classes}
    bases = {
        node.name: {ast.unparse(base).split(".")[-1] for base in node.bases} for node in classes
    }
    parents = {name: own & names for name, own in bases.items() if own & names}
    assert {name: own for name, own in parents.items() if own & parents.keys()} == {}
    nested = [
        child.name for node in classes for child in node.body if isinstance(child, ast.ClassDef)
    ]
    assert nested == []


def test_every_public_name_is_there():
    for name in rl.__all__:
        assert getattr(rl, name) is not None, name
    assert rl.masked.mean is importlib.import_module("jaxrlhf.core.masked").mean
    assert callable(rl.score)
