"""The whole journey in one command."""
