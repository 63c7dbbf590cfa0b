"""Read the results of finished runs from disk; the statistics and figures that compare and report share."""
