"""A checkpoint as it is read: its files, its headers, where each tensor's bytes lie."""
