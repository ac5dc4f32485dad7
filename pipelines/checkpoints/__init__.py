"""Checkpoint directories of a training run: writing, retention, fine-tuning, and import and export of released files."""
