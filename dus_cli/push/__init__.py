"""An output to the Hub: the verb, its command, and the Hub as a place to write to."""
