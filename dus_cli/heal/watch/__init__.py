"""A run as it is seen on a terminal."""
