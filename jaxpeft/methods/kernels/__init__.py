"""Families that change kernels in another way than LoRA."""
