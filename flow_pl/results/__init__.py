"""What finished runs measured, read from disk; statistics and figures that compare and report share."""
