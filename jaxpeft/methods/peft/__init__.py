"""HF PEFT's rules for configs, modules and names of tensors, which lie below every family."""
