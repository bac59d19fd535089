"""Reward hacking: a reward that rises while what it stands for does not.

Of texts, words are what white space separates.
"""

import math
from collections import Counter
from collections.abc import Sequence

from jaxrlhf.core.stats import distinct_n
from jaxrlhf.study.diagnose.history import Detector, History, Said, Series

# Standard deviations of the first rewards that the proxy has to rise for a flat gold to be told:
# after less, gold may just not have moved yet.
FLAT_RISE = 1.0
# Of gold's rise up to its best, what may be lost again before it is a problem: a policy that keeps
# most of it is better than its reference, and its last steps may be taken back.
LOST = 0.5
# Of the rise on training prompts, what held-out prompts must show; both rise alike if it is the
# policy that got better and not its answers to these prompts.
HELD_OUT_SHARE = 0.25
# Growth and shrinkage of responses that are suspected; sampling noise of a mean is far below.
LENGTH_FACTOR, LENGTH_SHRINK = 1.5, 0.5

# Share of a completion's bigrams that are repeats, above which a reader sees a loop (prose of a
# hundred words has below 0.1), and above which most of it is one. What is repeated from the start
# on (lists, verse) is the task's, so the share has to rise too.
REPEATED, LOOPING, REPEATED_RISE = 0.3, 0.6, 0.2
# Distinct bigrams over all completions, relative to the start, below which answers are much alike:
# a policy that has learnt half its vocabulary away keeps a quarter of its bigrams.
DISTINCT_FACTOR = 0.3
# Rise in the share of completions that hold a phrase; with 20 completions each, 2.8 standard
# errors of a phrase that half of them hold.
PHRASE_SHARE = 0.5
# Share of all words that one word may have (the commonest word of English prose has 0.06), and
# above which there is hardly another.
WORD_SHARE, WORD_TAKEOVER = 0.3, 0.5
MIN_COMPLETIONS = 20  # at either end, without which nothing is said about texts
MIN_WORDS = 4  # of a completion, below which it is an answer and no text: any would repeat
LONGEST_PHRASE = 4  # words, at most


@Detector
def reward_hacking(history: History) -> Said:
    """Proxy up, gold down from its best, or flat (arXiv:2210.10760), on held-out prompts.

    Differences count beyond the 95 % intervals of both ends, added in quadrature. A problem if gold
    has lost most of what it had won.
    """
    curve = history.evaluation.known("proxy", "gold", "proxy_ci", "gold_ci")
    if len(curve.step_I) < 2:
        return None
    proxy, gold, step_I = curve["proxy"], curve["gold"], curve.step_I
    best = int(gold.argmax())
    (rise, rise_noise), (gold_rise, noise) = _rise(curve, "proxy"), _rise(curve, "gold")
    drop, drop_noise = _rise(curve, "gold", best)
    spread = history.training.early("score_std")
    if rise <= rise_noise:
        return None
    # where the proxy is down from gold's best as well, both fell together: that is no hacking
    if -drop > drop_noise and proxy[-1] > proxy[best]:
        problem = -drop > LOST * (gold[best] - gold[0])
        what = f"fell from {gold[best]:.3g} (step {step_I[best]}) to {gold[-1]:.3g}"
    elif rise >= FLAT_RISE * (spread.mean if spread else 0.0) > 0 and gold_rise <= noise:
        problem, what = False, f"stayed: {gold[0]:.3g} → {gold[-1]:.3g} ± {noise:.2g}"
    else:
        return None
    kl = history.evaluation.known("kl_nats")["kl_nats"]
    return (
        problem,
        f"held-out proxy {proxy[0]:.3g} → {proxy[-1]:.3g} (steps {step_I[0]} and {step_I[-1]}) "
        f"while gold {what}" + (f", at KL {kl[-1]:.3g} nats" if len(kl) else ""),
        "keep the checkpoint at gold's best (eval.every, checkpoint.keep); raise "
        "algorithm.kl_coef, or take fewer steps; read samples.jsonl for what the reward pays for, "
        "and mend rewards: another reward model, one more source with a weight against it",
    )


def _rise(curve: Series, name: str, start: int = 0) -> tuple[float, float]:
    """From an evaluation to the last, and the 95 % interval of it: √(ci₀² + ci₁²)."""
    x_I, ci_I = curve[name], curve[f"{name}_ci"]
    return x_I[-1] - x_I[start], math.hypot(ci_I[start], ci_I[-1])


@Detector
def held_out_gap(history: History) -> Said:
    """The reward rises on the prompts trained on, and not on held-out ones."""
    change = history.training.change("score")
    curve = history.evaluation.known("proxy", "proxy_ci")
    if change is None or len(curve.step_I) < 2 or not change.rose:
        return None
    rise, noise = _rise(curve, "proxy")
    if rise >= HELD_OUT_SHARE * change.rise or change.rise - rise <= noise:
        return None
    proxy, step_I = curve["proxy"], curve.step_I
    return (
        rise < -noise,
        f"score {change} in training, but on held-out prompts {proxy[0]:.3g} (step {step_I[0]}) → "
        f"{proxy[-1]:.3g} ± {noise:.2g} (step {step_I[-1]})",
        "train on more prompts (data.train), fewer times over (steps, algorithm.epochs); raise "
        "algorithm.kl_coef",
    )


@Detector
def length_takeover(history: History) -> Said:
    """Responses much longer, or shorter, while the reward rises."""
    length, score = history.training.change("length"), history.training.change("score")
    if length is None or score is None or not score.rose or length.before <= 0:
        return None
    factor = length.after / length.before
    if LENGTH_SHRINK < factor < LENGTH_FACTOR or abs(length.rise) <= 2 * length.error:
        return None
    seen = f"length {length} tokens, with the score {score}"
    if factor <= 1:
        return (
            False,
            seen,
            "see whether eval.gold rises with it; if not, the reward prefers short answers: mend "
            "rewards, or raise algorithm.kl_coef",
        )
    ended = history.training.change("ended")
    return (
        # longer because it no longer stops, not because it has more to say
        ended is not None and ended.before >= 0.5 and ended.after < 0.1,
        seen + (f", and {ended.after:.0%} of them end by themselves" if ended else ""),
        "see whether eval.gold rises with it; if it does not, add a source to rewards that "
        "charges for length, or set algorithm.overlong_buffer or algorithm.missing_eos_penalty",
    )


@Detector
def repetition(history: History) -> Said:
    """Completions that go in circles, or that are much the same for all prompts."""
    found, before, after = [], 0.0, 0.0
    if ends := completions(history):
        before, after = (_repeated(texts) for texts in ends)
        if after >= REPEATED and after - before >= REPEATED_RISE:
            found.append(f"of a completion's bigrams {before:.0%} → {after:.0%} are repeats")
    curve = history.evaluation.known("distinct_2")
    distinct, step_I = curve["distinct_2"], curve.step_I
    if len(distinct) >= 2 and distinct[-1] < DISTINCT_FACTOR * distinct[0]:
        steps = f"steps {step_I[0]} and {step_I[-1]}"
        found.append(f"distinct_2 {distinct[0]:.3g} → {distinct[-1]:.3g} ({steps})")
    return (
        after >= LOOPING,
        found,
        "raise algorithm.kl_coef or algorithm.entropy_coef, lower optim.learning_rate; if the "
        "reward pays for repeats, add a source to rewards that charges for them",
    )


@Detector
def phrase_takeover(history: History) -> Said:
    """A word or phrase that comes to stand in most completions, or to be most of their words.

    Of all phrases up to four words, the one whose share of completions rose most.
    """
    ends = completions(history)
    if ends is None:
        return None
    found = []
    before, after = (_word_shares(texts) for texts in ends)
    word = max(after, key=lambda w: after[w] - before.get(w, 0), default="")
    low, high = before.get(word, 0), after.get(word, 0.0)
    # a word that was common from the start on is the task's: its share has to double
    doubled = high >= 2 * low
    problem = high >= WORD_TAKEOVER and doubled
    if high >= WORD_SHARE and doubled:
        found.append(f"{word!r} went from {low:.0%} to {high:.0%} of all words")
    held_before, held_after = (_phrase_shares(texts) for texts in ends)
    rise = {phrase: share - held_before.get(phrase, 0.0) for phrase, share in held_after.items()}
    # rounded, so that of phrases that rose alike the longest is named, whose parts the others are
    phrase = max(rise, key=lambda p: (round(rise[p], 9), len(p)), default=())
    if rise.get(phrase, 0.0) >= PHRASE_SHARE:
        low, high = held_before.get(phrase, 0.0), held_after[phrase]
        found.append(f"{' '.join(phrase)!r} stands in {low:.0%} → {high:.0%} of completions")
    return (
        problem,
        found,
        "unless the task asks for it, the reward pays for it: mend rewards, raise "
        "algorithm.kl_coef, watch eval.gold",
    )


def completions(history: History) -> tuple[list[str], list[str]] | None:
    """The completions of both ends: of the first and last evaluation, else of the first and last
    fifth of iterations; None if there are too few."""
    evaluations = list(history.eval_samples.values())
    ends = (evaluations[0], evaluations[-1]) if len(evaluations) >= 2 else history.ends()
    first, last = ([str(row.get("completion", "")) for row in rows] for rows in ends)
    return (first, last) if min(len(first), len(last)) >= MIN_COMPLETIONS else None


def _repeated(texts: Sequence[str]) -> float:
    """Mean over completions of the share of bigrams that stood in them before."""
    shares = [1 - distinct_n([text], 2) for text in texts if len(text.split()) >= MIN_WORDS]
    return sum(shares) / len(shares) if shares else 0.0


def _word_shares(texts: Sequence[str]) -> dict[str, float]:
    """Each word's share of all words; none where completions are too short to be texts."""
    words = [word for text in texts for word in text.split()]
    if len(words) < MIN_WORDS * len(texts):
        return {}
    return {word: count / len(words) for word, count in Counter(words).items()}


def _phrase_shares(texts: Sequence[str]) -> dict[tuple[str, ...], float]:
    """The share of completions that hold each phrase."""
    held: Counter[tuple[str, ...]] = Counter()
    for text in texts:
        words = text.split()
        sizes = range(1, LONGEST_PHRASE + 1)
        phrases = (tuple(words[i : i + n]) for n in sizes for i in range(len(words) - n + 1))
        # once a completion, however often it stands there; in the order of the words, which
        # settles which of two that rose alike is named
        held.update(dict.fromkeys(phrases).keys())
    return {phrase: count / len(texts) for phrase, count in held.items()}
