"""Reading a cache for `mar inspect` and `mar verify`."""
