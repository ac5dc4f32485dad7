"""Stage *generate*: a checkpoint draws samples."""
