"""All that a new GPU has to be asked, in one command: `python -m benchmarks.gpu` (docs/gpu.md)."""
