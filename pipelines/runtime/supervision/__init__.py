"""Detects failed and hung workers, and restarts their group."""
