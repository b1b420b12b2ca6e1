"""lit-tune: fine-tune LLaMA-family models with LoRA or in full, and know what fits your memory."""
