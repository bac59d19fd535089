"""What of a decoder's fields does not go together."""

from collections.abc import Iterator

from jaxrlhf.config.model import DecoderConfig


def decoder_problems(decoder: DecoderConfig) -> Iterator[str]:
    """What is wrong between the fields of ``model.decoder``, a line each."""
    for name in ("kv_heads", "full_kv_heads"):
        if (count := getattr(decoder, name)) and decoder.heads % count:
            yield (
                f"model.decoder: heads={decoder.heads} % {name}={count} is not 0: "
                "each key/value head serves the same number of query heads"
            )
    if (moe := decoder.moe) and moe.per_token > moe.experts:
        yield f"model.decoder.moe.per_token={moe.per_token}: there are experts={moe.experts}"
    if not decoder.gated and (moe or decoder.activation == "clamped"):
        what = "moe: experts have" if moe else "activation=clamped: it needs"
        yield f"model.decoder.{what} a gate: leave out gated"
    size = decoder.rotary_dim or decoder.head_dim
    if size % 2 or size > decoder.head_dim:
        name = "rotary_dim" if decoder.rotary_dim else "head_dim"
        what = f"must be even, for rotary positions, and at most head_dim={decoder.head_dim}"
        yield f"model.decoder.{name}={size}: {what}"
    yield from _shared(decoder)
    if decoder.full_head_dim % 2:
        yield f"model.decoder.full_head_dim={decoder.full_head_dim}: must be even"


def _shared(decoder: DecoderConfig) -> Iterator[str]:
    """Layers that share keys and values have somewhere to read them."""
    own = decoder.layers - decoder.shared_kv_layers
    windows = decoder.windows or (0,)
    kinds = [bool(windows[layer % len(windows)]) for layer in range(decoder.layers)]
    if not set(kinds[max(own, 0) :]) <= set(kinds[: max(own, 0)]):
        count, what = decoder.shared_kv_layers, "none before them has a window, or none, as they do"
        yield f"model.decoder.shared_kv_layers={count}: {what}: give fewer"
