"""What samples are compared with: where a reference comes from, and its statistics, computed once and kept."""
