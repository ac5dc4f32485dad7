"""From a model to images: the order of tokens, guidance, and fast modes."""
