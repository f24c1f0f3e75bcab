"""LoRA with all that PEFT's has: DoRA, embeddings, saved modules, its ways to start."""
