"""One script per headline number. Each prints JSON lines and a table, with a baseline measured in the same run."""
