"""Take an RWKV language model from its checkpoint to an app."""

__version__ = "0.1.0"
