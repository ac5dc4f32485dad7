"""`mar doctor`: the checks before a long job."""
