"""Bytes to a directory that is whole or not there."""
