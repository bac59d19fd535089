"""Tiny tokenizers of the four kinds there are, and folders that say what they are told.

Each reads letters, digits and some punctuation, and has a few merges, so that words are split in
more than one way.
"""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789[]().,?!:+-='"
CHATML = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
PLAIN = (  # headers are plain text, as TinyLlama's; only the end of a turn is a special token
    "{% for m in messages %}{{ '[' + m['role'] + ']\n' + m['content'] + eos_token + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '[assistant]\n' }}{% endif %}"
)
TURNS = ("<|end|>", "<|user|>", "<|assistant|>", "<|system|>", "<|tool|>")


def finish(tokenizer, special, template, **names):
    tokens = [AddedToken(text, special=True, normalized=False) for text in special]
    tokenizer.add_special_tokens(tokens)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=template,
        clean_up_tokenization_spaces=False,
        **names,
    )


def byte_level(more=(), template=CHATML, bos=False):
    """As GPT-2's and Llama 3's: bytes, and spaces in front of words; ``bos``: it adds one."""
    special = ("<pad>", "<bos>", "<eos>", *TURNS, *more)
    pairs = [("Ġ", "g"), ("o", "o"), ("Ġg", "oo"), ("h", "e"), ("l", "l"), (".", "Ċ")]
    vocab = {text: i for i, text in enumerate(special)}
    for text in (*sorted(pre_tokenizers.ByteLevel.alphabet()), *map("".join, pairs)):
        vocab.setdefault(text, len(vocab))
    tokenizer = Tokenizer(models.BPE(vocab, pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if bos:
        tokenizer.post_processor = TemplateProcessing(
            single="<bos> $A", special_tokens=[("<bos>", vocab["<bos>"])]
        )
    names = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}
    return finish(tokenizer, special, template, **names)


def sentencepiece(template=PLAIN):
    """As Llama 2's and Mistral's: ▁ is put before every text, and after every special token."""
    special = ("<unk>", "<s>", "</s>")
    vocab = {text: i for i, text in enumerate(special)}
    pairs = [("▁", "["), ("▁", "h"), ("▁", "g"), ("▁", "a"), ("a", "s"), ("u", "s"), ("e", "r")]
    for text in (*(f"<0x{b:02X}>" for b in range(256)), "▁", *LETTERS, *map("".join, pairs)):
        vocab.setdefault(text, len(vocab))
    tokenizer = Tokenizer(
        models.BPE(vocab, pairs, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", vocab["<s>"])]
    )
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return finish(tokenizer, special, template, **names)


def unigram(template=CHATML):
    """As T5's and Gemma's line of tokenizers: the likeliest pieces, with Metaspace."""
    special = ("<pad>", "<eos>", "<unk>", *TURNS)
    words = ("▁", "▁g", "▁good", "▁he", "llo", "oo", "es", "▁b", "ye", "\n", *LETTERS)
    pieces = [(text, 0.0) for text in special]
    pieces += [(text, -1.0 - 9.0 / len(text)) for text in dict.fromkeys(words)]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=2, byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace("▁", prepend_scheme="always")
    names = {"eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}
    return finish(tokenizer, special, template, **names)


def wordpiece(template=CHATML):
    """As BERT's: words, and ## before what goes on with one; white space is not kept."""
    special = ("[PAD]", "[UNK]", "[SEP]", *TURNS)
    words = ("hello", "good", "bye", "he", "##llo", *LETTERS, *(f"##{x}" for x in LETTERS))
    vocab = {text: i for i, text in enumerate(dict.fromkeys((*special, *words)))}
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    names = {"eos_token": "[SEP]", "pad_token": "[PAD]", "unk_token": "[UNK]"}
    return finish(tokenizer, special, template, **names)


KINDS = {
    "byte-level": byte_level,
    "sentencepiece": sentencepiece,
    "unigram": unigram,
    "wordpiece": wordpiece,
}


def rigged_folder(folder, tokenizer, vocab, always=None, generation=None, config=None, strength=40):
    """A Llama folder that says the token ``always`` whatever it has read; None: any of them.

    Args:
      generation: contents of generation_config.json, if there is to be one.
      config: more of config.json.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(folder)
    embed = np.zeros((vocab, 8), np.float32)
    embed[:, 0] = 1
    head = np.zeros((vocab, 8), np.float32)
    if always is not None:
        head[always, 0] = strength / 8**0.5
    shapes = {
        "self_attn.q_proj": (8, 8),
        "self_attn.k_proj": (8, 8),
        "self_attn.v_proj": (8, 8),
        "self_attn.o_proj": (8, 8),
        "mlp.gate_proj": (16, 8),
        "mlp.up_proj": (16, 8),
        "mlp.down_proj": (8, 16),
    }
    ones = np.ones(8, np.float32)
    layer = "model.layers.0."
    tensors = {
        f"{layer}{name}.weight": np.zeros(shape, np.float32) for name, shape in shapes.items()
    }
    tensors |= {f"{layer}{name}_layernorm.weight": ones for name in ("input", "post_attention")}
    tensors |= {
        "model.embed_tokens.weight": embed,
        "lm_head.weight": head,
        "model.norm.weight": ones,
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    shape = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocab,
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 4,
        "intermediate_size": 16,
        "hidden_act": "silu",
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "mlp_bias": False,
        "torch_dtype": "float32",
    }
    (folder / "config.json").write_text(json.dumps({**shape, **(config or {})}), encoding="utf-8")
    if generation is not None:
        path = folder / "generation_config.json"
        path.write_text(json.dumps(generation), encoding="utf-8")
    return str(folder)
