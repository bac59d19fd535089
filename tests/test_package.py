"""What the package says of itself, in all the places where it does."""

import re
import tomllib
from pathlib import Path

import yaml

import jaxrlhf

ROOT = Path(__file__).parents[1]


def project():
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def test_citation_is_of_this_version():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert cited["version"] == jaxrlhf.__version__
    assert cited["license"] == project()["license"]
    assert [a["name"] for a in cited["authors"]] == [a["name"] for a in project()["authors"]]


def test_type_hints_are_for_others_too():
    assert (ROOT / "jaxrlhf" / "py.typed").exists()


def test_every_extra_says_what_it_is_for():
    extras = project()["optional-dependencies"]
    text = (ROOT / "docs" / "install.md").read_text(encoding="utf-8")
    first = " ".join(re.findall(r"^\| (`.*?) \|", text, re.M))
    assert set(re.findall(r"`([\w-]+)`", first)) == set(extras)
