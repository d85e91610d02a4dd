"""From a finished run to a published model."""
