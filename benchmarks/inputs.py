"""What benchmarks train on where neither the answers nor the losses matter: many records, and a tiny base."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lit_tune.data.instruct import bundled_sample
from lit_tune.modules import load, smollm2

RECORDS = 5000


def many_records(path: Path) -> str:
    """Write 5,000 different records made of the bundled ones, and return the file's name."""
    sample = [json.loads(line) for line in Path(bundled_sample()).read_text().splitlines()]
    rows = (
        sample[i % len(sample)] | {"instruction": f"{sample[i % len(sample)]['instruction']} ({i})"}
        for i in range(RECORDS)
    )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def tiny_base(directory: Path) -> str:
    """Save a two-layer Llama with SmolLM2's tokenizer, and return the directory."""
    tokenizer = load.load_tokenizer(str(smollm2.prepared_directory()))
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return str(directory)
