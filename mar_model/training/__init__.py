"""The training step in plain PyTorch: recipe, strategies, averages, order of samples, memory."""
