"""`dus probe`: the loss that layer maps would have right after scaling, from the base's layers, nothing written.

torch and transformers are imported in functions of this folder only.
"""
