"""What every stage stands on: paths, records, errors, progress, MLflow, and the Ray cluster."""
