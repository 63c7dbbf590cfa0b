"""Programs that are not tests: benchmarks, faults, fuzzing."""
