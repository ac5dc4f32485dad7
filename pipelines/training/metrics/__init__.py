"""A training run's figures: means of an interval, telemetry, `metrics.jsonl`, Prometheus, and whether the run diverged."""
