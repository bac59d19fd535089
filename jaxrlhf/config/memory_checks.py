"""Rules between the fields that save memory."""

from collections.abc import Iterator

from jaxrlhf.config.run import Config


def memory_problems(config: Config) -> Iterator[str]:
    """What cannot be saved, or would cost more than memory; a line each."""
    if config.reference.offload and config.model.lora and not config.reference.path:
        yield (
            "reference.offload: with model.lora the reference is the weights under the adapters, "
            "which the policy needs all the time: leave it out"
        )
    for name in ("b1", "b2"):
        decay = getattr(config.optim, name)
        if config.optim.state_dtype == "bfloat16" and decay > 0.99:
            yield (
                f"optim.{name}={decay}: what a step adds to a bfloat16 moment would be lost in its "
                "rounding: give at most 0.99, or optim.state_dtype: float32"
            )
