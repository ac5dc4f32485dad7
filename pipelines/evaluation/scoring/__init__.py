"""Images → features on Ray, kept as Arrow shards, and metrics of kept features."""
