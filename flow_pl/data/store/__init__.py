"""The client store: clients as contiguous, memory-mapped rows."""
