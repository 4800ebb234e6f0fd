"""Large tensors in safetensors files: any range of any of them, written and read by many."""
