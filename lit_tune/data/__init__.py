"""Instruction data: from records on disk to the batches of an optimizer step."""
