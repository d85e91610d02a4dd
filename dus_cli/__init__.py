"""dus: depth up-scaling of Hugging Face checkpoints (SOLAR 10.7B, arXiv:2312.15166)."""

__version__ = "0.1.0"
