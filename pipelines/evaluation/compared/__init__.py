"""Evaluations side by side, and published figures beside them."""
