"""Programs, not tests: benchmarks, faults, fuzzing."""
