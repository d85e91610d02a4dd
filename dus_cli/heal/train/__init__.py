"""What a worker does: the training loop and its parts."""
