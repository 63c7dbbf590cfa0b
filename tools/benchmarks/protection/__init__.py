"""What privacy, robust aggregation and compression cost in accuracy and time."""
