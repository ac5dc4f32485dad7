"""Stage *tokenize*: train an autoencoder on images."""
