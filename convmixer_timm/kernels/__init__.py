"""What makes a training step fast on CPUs."""
