"""Evaluation of a tokenizer by its reconstructions of images."""
