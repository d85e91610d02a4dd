"""What stands beside the weights: the card and its pictures, dus.json, SHA256SUMS, and following
them again.
"""
