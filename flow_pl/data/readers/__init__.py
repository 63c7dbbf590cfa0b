"""Readers of file formats and releases, one a file."""
