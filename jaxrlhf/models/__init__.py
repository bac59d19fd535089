"""Networks: the decoder, its weights in and out of every format, tokenizers, adapters.

Flax NNX lives only here; no loss and no sampling does. Imports core, config and mesh. What reads
weights (``read``, ``hf``, ``hf_config``, ``gguf``, ``names``) imports neither JAX nor transformers,
so that it can begin while they are being imported.
"""
