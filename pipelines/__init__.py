"""The stages on Ray, and the contracts between them. A room imports only rooms to its left (see docs/architecture.md)."""
