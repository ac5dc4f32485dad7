"""Stage *train*: trains a model on a latent cache and writes checkpoints."""
