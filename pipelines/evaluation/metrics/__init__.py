"""Metrics of image features: pure functions of arrays and of sums, one file for each family."""
