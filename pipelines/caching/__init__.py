"""Stage *cache*: encodes images with a tokenizer and writes a latent cache."""
