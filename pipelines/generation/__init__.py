"""Stage *generate*: draws samples from a checkpoint."""
