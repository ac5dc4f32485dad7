"""Stage *train*: a latent cache becomes checkpoints."""
