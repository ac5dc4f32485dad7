"""The run configuration: schema, loading, and checks across settings."""
