"""Plan the output: everything is decided before the first byte is written."""
