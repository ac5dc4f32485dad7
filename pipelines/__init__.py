"""One module a stage, and the data contracts between the stages."""
