"""Bytes on disk: what every room may import, and what imports nothing else of the project."""
