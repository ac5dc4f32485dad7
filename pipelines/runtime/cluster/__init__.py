"""The Ray cluster: connection, worker resources, messages, signals, and cleanup after a killed driver."""
