"""LoRA in the format of HF PEFT, part by part."""
