"""Correctness and speed of a new GPU in one command: `python -m benchmarks.gpu` (docs/gpu.md)."""
