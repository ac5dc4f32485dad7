"""All stages in one command."""
