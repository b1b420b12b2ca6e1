"""Tokenizers made in code, so that tests need no files of a model and no network."""

from typing import Literal

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaTokenizer, PreTrainedTokenizerFast

BOS, EOS, PAD = "<s>", "</s>", "<pad>"
CHAT_TOKENS = (
    "<|im_start|>",
    "<|im_end|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
)

# Enough merges that words, spaces and line breaks join into tokens as they do in a trained vocabulary.
_MERGES = [
    ("Ġ", "t"),
    ("h", "e"),
    ("Ġt", "he"),
    ("Ċ", "Ċ"),
    ("Ġ", "a"),
    ("i", "n"),
    ("Ġ", "Ġ"),
    ("in", "g"),
    ("s", "t"),
]

# How Llama 3 cuts a text into words before it merges within them.
_LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def tiny_tokenizer(
    *, prepends_bos: bool = True, eos: bool = True, chat_template: str | None = None
) -> PreTrainedTokenizerFast:
    """Make a byte-level BPE tokenizer of Llama 3's kind, with 273 tokens.

    Args:
        prepends_bos: Put <s> before every text, as Llama's tokenizers do.
        eos: Have an eos token.
        chat_template: The tokenizer's own chat template.
    """
    special = [BOS, EOS, PAD, *CHAT_TOKENS]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*special, *alphabet, *("".join(pair) for pair in _MERGES)]
    backend = Tokenizer(models.BPE(vocab={word: index for index, word in enumerate(words)}, merges=_MERGES))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_LLAMA3_WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in special])
    if prepends_bos:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, words.index(BOS))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=BOS,
        eos_token=EOS if eos else None,
        pad_token=PAD,
        chat_template=chat_template,
    )


def tiny_sentencepiece_tokenizer(spaces: Literal["first", "always"] = "first") -> LlamaTokenizer:
    """Make a tokenizer of Llama 2's kind: a text's first word gets a space, unknown characters become bytes.

    Args:
        spaces: Whether the space comes at the text's beginning only, or after every special token too.
    """
    pieces = ["▁", *map(chr, range(33, 127)), "▁t", "he", "▁the", "▁a", "in", "st"]
    words = ["<unk>", BOS, EOS, *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    tokenizer = LlamaTokenizer(
        vocab={word: index for index, word in enumerate(words)},
        merges=[("▁", "t"), ("h", "e"), ("▁t", "he"), ("▁", "a"), ("i", "n"), ("s", "t")],
        legacy=spaces == "always",
        add_bos_token=True,
    )
    tokenizer.add_tokens(list(CHAT_TOKENS), special_tokens=True)
    return tokenizer
