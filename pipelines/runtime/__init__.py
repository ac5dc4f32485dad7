"""Infrastructure shared by all stages: storage, records, errors, progress, MLflow, and the Ray cluster."""
