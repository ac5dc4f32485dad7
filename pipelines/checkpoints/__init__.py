"""Checkpoint directories of a training run: writing, retention, fine-tuning, and released files."""
