"""Turns of a chat, a template for them, and a tokenizer for any template."""

import re

from tokenizers import AddedToken, Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerFast

CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }} : {{ m['content'] }} <eos>\n{% endfor %}"
    "{% if add_generation_prompt %}assistant : {% endif %}"
)


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def byte_tokenizer(template, bos="<s>", eos="</s>"):
    """Bytes are tokens, and so are the marks that a template writes whole; it adds no bos."""
    marks = re.findall(r"<[|｜][^<>'\n]*?[|｜]>|<\w+_of_turn>|\[/?[A-Z_]+\]", template)
    special = list(dict.fromkeys([bos, eos, "<pad>", *marks]))
    vocab = {token: i for i, token in enumerate(special)}
    for byte in sorted(ByteLevel.alphabet()):
        vocab.setdefault(byte, len(vocab))
    backend = Tokenizer(BPE(vocab, []))
    backend.pre_tokenizer = ByteLevel(add_prefix_space=False)
    backend.decoder = ByteLevelDecoder()
    backend.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=bos,
        eos_token=eos,
        pad_token="<pad>",
        chat_template=template,
    )
