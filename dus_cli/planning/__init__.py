"""Everything that is decided before the first byte is written."""
