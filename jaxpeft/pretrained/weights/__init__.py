"""From tensors in files to parameters on devices, whatever the container."""
