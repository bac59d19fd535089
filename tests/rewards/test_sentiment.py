import sys

import pytest
import vader

from jaxrlhf.core.errors import InputError
from jaxrlhf.rewards import functions as sentiment


def test_make_scores_are_compound_and_bounded():
    function = sentiment.make()
    texts = ["The meal was good.", "The meal was terrible!", "The meal was on a table.", ""]
    good, bad, neutral, empty = function([""] * 4, texts)
    assert good == vader.polarity_scores(texts[0])["compound"] > 0.4
    assert bad < -0.4
    assert neutral == empty == 0.0
    assert 0.99 < function([""], ["excellent wonderful " * 200])[0] <= 1.0


def test_make_scores_the_completion_not_the_prompt():
    function = sentiment.make()
    assert function(["terrible"], ["good"], topic=["x"]) == function([""], ["good"])


def test_make_creates_the_analyzer_once(monkeypatch):
    made = []

    class Counted(vader.SentimentIntensityAnalyzer):
        def __init__(self):
            made.append(self)
            super().__init__()

    monkeypatch.setattr(vader, "SentimentIntensityAnalyzer", Counted)
    function = sentiment.make()
    function(["", ""], ["good", "bad"])
    function([""], ["good"])
    assert len(made) == 1


def test_make_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "vader", None)
    with pytest.raises(InputError, match=r"pip install jaxrlhf\[demo\]"):
        sentiment.make()
