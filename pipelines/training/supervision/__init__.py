"""Failed and hung workers: noticing them, and starting their group again."""
