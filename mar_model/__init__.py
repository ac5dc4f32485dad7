"""Plain PyTorch: the model, its diffusion, generation and tokenizers. Usable alone."""
