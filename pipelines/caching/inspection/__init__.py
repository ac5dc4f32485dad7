"""What `mar inspect` and `mar verify` read of a cache."""
