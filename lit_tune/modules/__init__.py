"""The LightningModule and what it is made of: loading, LoRA, attention, loss, optimizer."""
