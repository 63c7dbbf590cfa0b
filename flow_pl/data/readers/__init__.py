"""Read file formats and published data sets; one module each."""
