"""Checkpoint directories, and the files of the public release."""
