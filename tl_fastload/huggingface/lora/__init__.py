"""LoRA adapters: found, checked, and merged into the promises of a model."""
