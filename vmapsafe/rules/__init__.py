"""The rules, one file a family. Importing this package registers them, in order."""

from vmapsafe.rules import batch_norm, buffers, convolution, random_numbers, sync

__all__ = ["batch_norm", "buffers", "convolution", "random_numbers", "sync"]
