"""The classifier that measures label agreement: its network, and its training."""
