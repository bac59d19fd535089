"""What is wrong with a run, read from what it has written down; what each detector looks for."""

from pathlib import Path

from jaxrlhf.study.diagnose import critic, divergence, endings, hacking, offline, signal
from jaxrlhf.study.diagnose.finding import Detector, Finding
from jaxrlhf.study.diagnose.history import History, read_history

DETECTORS: dict[str, Detector] = {
    "reward_hacking": hacking.reward_hacking,
    "held_out_gap": hacking.held_out_gap,
    "length_takeover": hacking.length_takeover,
    "repetition": hacking.repetition,
    "phrase_takeover": hacking.phrase_takeover,
    "kl_blow_up": divergence.kl_blow_up,
    "kl_stall": divergence.kl_stall,
    "kl_negative": divergence.kl_negative,
    "entropy_collapse": divergence.entropy_collapse,
    "large_updates": divergence.large_updates,
    "sampler_mismatch": divergence.sampler_mismatch,
    "non_finite_updates": divergence.non_finite_updates,
    "value_function": critic.value_function,
    "no_eos": endings.no_eos,
    "empty_responses": endings.empty_responses,
    "equal_rewards": signal.equal_rewards,
    "groups_without_signal": signal.groups_without_signal,
    "reward_scale": signal.reward_scale,
    "length_correlation": signal.length_correlation,
    "excluded_rows": signal.excluded_rows,
    "chance_accuracy": offline.chance_accuracy,
    "overfitting": offline.overfitting,
    "chosen_logp_falls": offline.chosen_logp_falls,
    "margin_explosion": offline.margin_explosion,
}
"""Every detector, by the name of what it finds."""


def diagnose(folder: str | Path) -> list[Finding]:
    """What all detectors find in a run's folder, problems first.

    Args:
      folder: the output folder of a run, finished or not.

    Raises:
      InputError: not the folder of a run, nothing recorded yet, a line that is no record.
    """
    return examine(read_history(folder))


def examine(history: History) -> list[Finding]:
    """What all detectors find in a history, problems first."""
    found = [finding for detect in DETECTORS.values() for finding in detect(history)]
    return sorted(found, key=lambda finding: finding.severity != "problem")


__all__ = ["DETECTORS", "Finding", "History", "diagnose", "examine", "read_history"]
