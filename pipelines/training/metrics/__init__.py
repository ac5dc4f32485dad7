"""Metrics of a training run: interval means, telemetry, `metrics.jsonl`, Prometheus, and detection of divergence."""
