"""Evaluation of every kept checkpoint of a training run: metrics against images seen."""
