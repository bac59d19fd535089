"""Learning where the right answer is known: a space of responses small enough to enumerate.

There π*(y|x) = π_ref(y|x)·exp(r(x, y)/β) / Z(x) is a table, KL(π_θ‖π*) is a sum, and a whole
training run is one ``lax.scan``. ``python -m jaxrlhf.oracle`` prints how close each one comes.
"""

from jaxrlhf.oracle.learning import Result, Settings, learn, learn_pairs
from jaxrlhf.oracle.tabular import Problem, Space, forward, kl_to, make_problem, make_space

__all__ = [
    "Problem",
    "Result",
    "Settings",
    "Space",
    "forward",
    "kl_to",
    "learn",
    "learn_pairs",
    "make_problem",
    "make_space",
]
