"""The Ray cluster: connection, worker resources, messages, signals, and what a killed driver leaves behind."""
