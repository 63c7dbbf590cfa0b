"""Encode the contents of files as numbers: images, vectors, texts, tags."""
