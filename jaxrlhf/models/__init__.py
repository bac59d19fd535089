"""Networks: the decoder and its weights in and out of every format, tokenizers, adapters.

Flax NNX lives only here; no loss and no sampling does. Imports core, config and mesh."""
