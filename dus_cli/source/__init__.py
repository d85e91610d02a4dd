"""Read a checkpoint: its files, its headers, and where each tensor's bytes are."""
