"""A tiny Llama with random weights, for tests that need a model and no meaning."""

from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from tests.tiny import tiny_tokenizer

VOCABULARY = 300  # the byte tokenizer's 256 and room for special tokens


def tiny_llama(
    *, vocabulary: int = VOCABULARY, tied: bool = False, seed: int = 0, layers: int = 2, width: int = 32
) -> LlamaForCausalLM:
    """Return a Llama with grouped-query attention, fp32, the same weights for the same seed."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=tied,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config)


def save_tiny_llama(directory: Path, *, vocabulary: int = VOCABULARY) -> Path:
    """Write the tiny Llama to `directory` as safetensors, without a tokenizer."""
    tiny_llama(vocabulary=vocabulary).save_pretrained(directory)
    return directory


def tiny_base(
    directory: Path, *, seed: int = 0, tokenizer: PreTrainedTokenizerBase | None = None, tied: bool = False
) -> Path:
    """Write a complete base to `directory`: the tiny Llama with a vocabulary that fits, and its tokenizer."""
    tokenizer = tokenizer or tiny_tokenizer()
    tiny_llama(vocabulary=len(tokenizer), tied=tied, seed=seed).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory
