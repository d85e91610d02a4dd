"""The files beside the weights (model card, pictures, dus.json, SHA256SUMS), and making a release
again from them.
"""
