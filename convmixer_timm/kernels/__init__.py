"""What makes training and evaluation fast on CPUs, and training on GPUs."""
