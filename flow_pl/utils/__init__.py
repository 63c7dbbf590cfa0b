"""What every room uses and has no subject of its own."""
