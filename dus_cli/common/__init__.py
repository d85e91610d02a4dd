"""Helpers that know nothing of models; every room may use them."""
