"""Held-out losses and tasks: several models side by side on the same text.

torch, transformers and lm_eval are imported below here only, and only when something is evaluated.
"""
