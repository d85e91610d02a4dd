"""Progress on a terminal and as JSON Lines."""
