"""From options to run.json, and torchrun started on it."""
