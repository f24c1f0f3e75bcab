"""AdaLoRA: singular values that compete for a budget of ranks."""
