"""tierd puts model files where GPUs need them: an overlay that records, caches and recalls."""

__version__ = "0.1.0"
