"""The drawings on the pages of algorithms: they are there, small, and what their script makes."""

import importlib.util
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
SPEC = importlib.util.spec_from_file_location("curves", ROOT / "benchmarks/curves.py")
curves = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(curves)

SVG = "{http://www.w3.org/2000/svg}"


@pytest.mark.parametrize("page", curves.PAGES)
def test_page_has_its_drawing(page):
    path = ROOT / f"docs/curves/{page}.svg"
    assert path.stat().st_size <= 15_000
    drawn = ElementTree.parse(path).getroot()
    said = [text.text for text in drawn.iter(f"{SVG}text")]
    names = [curves.name_of(config) for config in curves.PAGES[page]]
    assert set(names) <= set(said)
    assert len(list(drawn.iter(f"{SVG}polyline"))) == 2 * len(names)
    text = (ROOT / f"docs/algorithms_{page}.md").read_text(encoding="utf-8")
    assert f"](curves/{page}.svg)" in text
    assert f"`python benchmarks/curves.py {page}`" in text


def test_drawing_goes_from_the_first_value_to_the_last():
    """Up is better on the left, and both panels have the optimum's level between their ends."""
    way = curves.Curve(np.linspace(0, 1, 301), np.linspace(0, 2, 301))
    drawn = ElementTree.fromstring(curves.drawing({"ppo": way}, (0.5, 1.0)))
    for line in drawn.iter(f"{SVG}polyline"):
        points = [tuple(map(float, point.split(","))) for point in line.attrib["points"].split()]
        assert len(points) == curves.POINTS
        (left, low), (right, high) = points[0], points[-1]
        assert left == curves.LEFT
        assert right == curves.WIDTH - 14
        assert low > high
        dashed = [x for x in drawn.iter(f"{SVG}line") if "stroke-dasharray" in x.attrib]
        assert all(high < float(x.attrib["y1"]) < low for x in dashed)
        assert float(dashed[0].attrib["y1"]) == pytest.approx((low + high) / 2, abs=0.2)
