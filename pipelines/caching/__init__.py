"""Stage *cache*: images and a tokenizer become a latent cache."""
