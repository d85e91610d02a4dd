"""Write an output directory that is whole or does not exist."""
