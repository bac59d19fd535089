"""Detectors of reward hacking: a reward that rises while what it stands for does not."""

import math
from collections import Counter
from collections.abc import Sequence

from jaxrlhf.run.record import distinct_n
from jaxrlhf.study.diagnose.finding import Finding
from jaxrlhf.study.diagnose.history import History, fifth

FLAT_RISE = 1.0
"""Standard deviations of the first rewards that the proxy has to rise for a flat gold to be told:
after less, gold may just not have moved yet."""

LOST = 0.5
"""Of gold's rise up to its best, what may be lost again before it is a problem: a policy that keeps
most of it is better than its reference, and its last steps may be taken back."""

HELD_OUT_SHARE = 0.25
"""Of the rise on training prompts, what held-out prompts must show; both rise alike if it is the
policy that got better and not its answers to these prompts."""

LENGTH_FACTOR = 1.5
"""Growth of responses from which length is suspected; sampling noise of a mean is far below."""

LENGTH_SHRINK = 0.5
"""Shrinkage to this factor is suspected as well."""

REPEATED = 0.3
"""Share of a completion's bigrams that are repeats, above which a reader sees a loop; prose of a
hundred words has below 0.1."""

LOOPING = 0.6
"""Above this most of a completion is a loop."""

REPEATED_RISE = 0.2
"""What is repeated from the start on (lists, verse) is the task's, so the share has to rise too."""

DISTINCT_FACTOR = 0.3
"""Distinct bigrams over all completions, relative to the start, below which answers are much alike:
a policy that has learnt half its vocabulary away keeps a quarter of its bigrams."""

PHRASE_SHARE = 0.5
"""Rise in the share of completions that hold a phrase; with 20 completions each, 2.8 standard
errors of a phrase that half of them hold."""

WORD_SHARE = 0.3
"""Share of all words that one word may have; the commonest word of English prose has 0.06."""

WORD_TAKEOVER = 0.5
"""Above this there is hardly another word."""

MIN_COMPLETIONS = 20
"""Completions at either end without which nothing is said about texts."""

MIN_WORDS = 4
"""Words of a completion below which it is an answer and no text: any would repeat."""

LONGEST_PHRASE = 4
"""Words of a phrase, at most."""


def reward_hacking(history: History) -> list[Finding]:
    """Proxy up, gold down from its best, or flat (arXiv:2210.10760), on held-out prompts.

    Differences count beyond the 95 % intervals of both ends, added in quadrature. A problem if gold
    has lost most of what it had won.
    """
    curve = history.evaluation.known("proxy", "gold", "proxy_ci", "gold_ci")
    if len(curve.step_I) < 2:
        return []
    proxy, gold = curve["proxy"], curve["gold"]
    proxy_ci, gold_ci = curve["proxy_ci"], curve["gold_ci"]
    best, last = int(gold.argmax()), len(gold) - 1
    if proxy[-1] - proxy[0] <= math.hypot(proxy_ci[0], proxy_ci[-1]):
        return []
    ends = f"steps {curve.step_I[0]} and {curve.step_I[-1]}"
    seen = f"held-out proxy {proxy[0]:.3g} → {proxy[-1]:.3g} ({ends}) while gold "
    fell = gold[best] - gold[last] > math.hypot(gold_ci[best], gold_ci[last])
    if fell and proxy[last] > proxy[best]:
        what = f"fell from {gold[best]:.3g} (step {curve.step_I[best]}) to {gold[last]:.3g}"
        lost = gold[best] - gold[last] > LOST * (gold[best] - gold[0])
        severity = "problem" if lost else "warning"
        return [Finding("reward_hacking", severity, seen + what + _at_kl(history), _MEND_REWARD)]
    spread = history.training.known("score_std")["score_std"]
    spread = float(spread[: fifth(len(spread))].mean()) if len(spread) else 0.0
    noise = math.hypot(gold_ci[0], gold_ci[-1])
    if proxy[-1] - proxy[0] >= FLAT_RISE * spread > 0 and gold[-1] - gold[0] <= noise:
        what = f"stayed: {gold[0]:.3g} → {gold[-1]:.3g} ± {noise:.2g}"
        return [Finding("reward_hacking", "warning", seen + what + _at_kl(history), _MEND_REWARD)]
    return []


_MEND_REWARD = (
    "keep the checkpoint at gold's best (eval.every, checkpoint.keep); raise algorithm.kl_coef, or "
    "take fewer steps; read samples.jsonl for what the reward pays for, and mend rewards: another "
    "reward model, one more source with a weight against it"
)


def _at_kl(history: History) -> str:
    kl = history.evaluation.known("kl_nats")["kl_nats"]
    return f", at KL {kl[-1]:.3g} nats" if len(kl) else ""


def held_out_gap(history: History) -> list[Finding]:
    """The reward rises on the prompts trained on, and not on held-out ones."""
    change = history.training.change("score")
    curve = history.evaluation.known("proxy", "proxy_ci")
    if change is None or len(curve.step_I) < 2 or not change.rose:
        return []
    rise = curve["proxy"][-1] - curve["proxy"][0]
    noise = math.hypot(curve["proxy_ci"][0], curve["proxy_ci"][-1])
    if rise >= HELD_OUT_SHARE * change.rise or change.rise - rise <= noise:
        return []
    return [
        Finding(
            "held_out_gap",
            "problem" if rise < -noise else "warning",
            f"score {change} in training, but on held-out prompts {curve['proxy'][0]:.3g} (step "
            f"{curve.step_I[0]}) → {curve['proxy'][-1]:.3g} ± {noise:.2g} (step "
            f"{curve.step_I[-1]})",
            "train on more prompts (data.train), fewer times over (steps, algorithm.epochs); raise "
            "algorithm.kl_coef",
        )
    ]


def length_takeover(history: History) -> list[Finding]:
    """Responses much longer, or shorter, while the reward rises."""
    length, score = history.training.change("length"), history.training.change("score")
    if length is None or score is None or not score.rose or length.before <= 0:
        return []
    factor = length.after / length.before
    if LENGTH_SHRINK < factor < LENGTH_FACTOR or abs(length.rise) <= 2 * length.error:
        return []
    ended = history.training.change("ended")
    runaway = ended is not None and ended.before >= 0.5 and ended.after < 0.1
    cut = f", and {ended.after:.0%} of them end by themselves" if factor > 1 and ended else ""
    return [
        Finding(
            "length_takeover",
            "problem" if factor > 1 and runaway else "warning",
            f"length {length} tokens, with the score {score}{cut}",
            "see whether eval.gold rises with it; if it does not, add a source to rewards that "
            "charges for length, or set algorithm.overlong_buffer or algorithm.missing_eos_penalty"
            if factor > 1
            else "see whether eval.gold rises with it; if not, the reward prefers short answers: "
            "mend rewards, or raise algorithm.kl_coef",
        )
    ]


def repetition(history: History) -> list[Finding]:
    """Completions that go in circles, or that are much the same for all prompts.

    Words are what white space separates.
    """
    ends = completions(history)
    found = []
    if ends is not None:
        before, after = (_repeated(texts) for texts in ends)
        if after >= REPEATED and after - before >= REPEATED_RISE:
            found.append(f"of a completion's bigrams {before:.0%} → {after:.0%} are repeats")
    curve = history.evaluation.known("distinct_2")
    distinct = curve["distinct_2"]
    if len(distinct) >= 2 and distinct[-1] < DISTINCT_FACTOR * distinct[0]:
        steps = f"steps {curve.step_I[0]} and {curve.step_I[-1]}"
        found.append(f"distinct_2 {distinct[0]:.3g} → {distinct[-1]:.3g} ({steps})")
    if not found:
        return []
    loops = ends is not None and _repeated(ends[1]) >= LOOPING
    return [
        Finding(
            "repetition",
            "problem" if loops else "warning",
            "; ".join(found),
            "raise algorithm.kl_coef or algorithm.entropy_coef, lower optim.learning_rate; if the "
            "reward pays for repeats, add a source to rewards that charges for them",
        )
    ]


def phrase_takeover(history: History) -> list[Finding]:
    """A word or phrase that comes to stand in most completions, or to be most of their words.

    Of all phrases up to four words, the one whose share of completions rose most; words are what
    white space separates.
    """
    ends = completions(history)
    if ends is None:
        return []
    found = []
    before, after = (_word_shares(texts) for texts in ends)
    word = max(after, key=lambda w: after[w] - before.get(w, 0), default="")
    share = after.get(word, 0.0)
    if share >= WORD_SHARE and share >= 2 * before.get(word, 0):
        found.append(f"{word!r} went from {before.get(word, 0):.0%} to {share:.0%} of all words")
    held_before, held_after = (_phrase_shares(texts) for texts in ends)
    rise = {phrase: x - held_before.get(phrase, 0.0) for phrase, x in held_after.items()}
    phrase = max(rise, key=lambda p: (round(rise[p], 9), len(p)), default=())
    if rise.get(phrase, 0.0) >= PHRASE_SHARE:
        low, high = held_before.get(phrase, 0.0), held_after[phrase]
        found.append(f"{' '.join(phrase)!r} stands in {low:.0%} → {high:.0%} of completions")
    if not found:
        return []
    return [
        Finding(
            "phrase_takeover",
            "problem" if share >= WORD_TAKEOVER and share >= 2 * before.get(word, 0) else "warning",
            "; ".join(found),
            "unless the task asks for it, the reward pays for it: mend rewards, raise "
            "algorithm.kl_coef, watch eval.gold",
        )
    ]


def completions(history: History) -> tuple[list[str], list[str]] | None:
    """The completions of both ends: of the first and last evaluation, else of the first and last
    fifth of iterations; None if there are too few."""
    steps = list(history.eval_samples)
    if len(steps) >= 2:
        ends = [history.eval_samples[steps[0]], history.eval_samples[steps[-1]]]
    else:
        steps = list(history.samples)
        n = fifth(len(steps))
        ends = [
            [row for step in part for row in history.samples[step]]
            for part in (steps[:n], steps[len(steps) - n :])
        ]
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
        held.update(
            {
                tuple(words[i : i + n])
                for n in range(1, LONGEST_PHRASE + 1)
                for i in range(len(words) - n + 1)
            }
        )
    return {phrase: count / len(texts) for phrase, count in held.items()}
