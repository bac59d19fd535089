"""Which command brings an extra, from a clone and from an installed package."""

from importlib.metadata import PackageNotFoundError

import pytest

from jaxrlhf.core import errors


def test_to_install_of_a_clone():
    clone = errors.Path(errors.__file__).parents[2]
    assert errors.to_install("demo") == f"pip install -e '{clone}[demo]'"


def requires(name):
    assert name == "jaxrlhf"
    return [
        "jax<0.13,>=0.10",
        'nltk-vader-sentiment>=1.0; extra == "demo"',
        'math-verify>=0.9; extra == "verifiers"',
        'reasoning-gym>=0.1.25; extra == "verifiers"',
    ]


def nothing(name):
    raise PackageNotFoundError(name)


@pytest.mark.parametrize(
    ("known", "command"),
    [
        (requires, "pip install 'math-verify>=0.9' 'reasoning-gym>=0.1.25'"),
        (nothing, "pip install jaxrlhf[verifiers]"),
    ],
)
def test_to_install_of_a_package(known, command, monkeypatch, tmp_path):
    """Its files lie in site-packages; there may be no release that has the extra."""
    monkeypatch.setattr(errors, "__file__", str(tmp_path / "jaxrlhf" / "core" / "errors.py"))
    monkeypatch.setattr(errors, "requires", known)
    assert errors.to_install("verifiers") == command
