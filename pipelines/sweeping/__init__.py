"""Stage *sweep*: many trainings or generations compared."""
