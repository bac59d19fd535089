"""How kind a text is, by a lexicon: a reward that needs no model, no network and no labels."""

from collections.abc import Callable
from typing import Any

from jaxrlhf.errors import InputError


def make() -> Callable[..., list[float]]:
    """A reward function: VADER's compound score of each completion.

    s/√(s² + 15) of the summed valences s, in [−1, 1]: −1 most negative, 0 neutral or empty
    (Hutto & Gilbert, ICWSM 2014). The prompt is not scored: the policy did not write it.

    Raises:
      InputError: the package is not installed.
    """
    try:
        from vader import SentimentIntensityAnalyzer  # noqa: PLC0415 (optional extra)
    except ImportError as error:
        raise InputError(
            "reward function 'sentiment' needs nltk-vader-sentiment; pip install jaxrlhf[demo]"
        ) from error
    analyzer = SentimentIntensityAnalyzer()

    def sentiment(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        return [analyzer.polarity_scores(text)["compound"] for text in completions]

    return sentiment
