"""Which layer goes where, and what of a config follows it: pure, no file is opened here."""
