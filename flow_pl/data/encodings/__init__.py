"""How what a file holds becomes numbers: images, vectors, texts, tags."""
