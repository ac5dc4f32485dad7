"""Stage *evaluate*: samples and a reference become metrics."""
