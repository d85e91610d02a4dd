"""Held-out losses and tasks: several models side by side on the same text.

torch, transformers and lm_eval are imported only once something is evaluated.
"""
