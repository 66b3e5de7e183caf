"""The rules, one file a family. Importing this package registers them, in order."""

from vmapsafe.rules import (
    batch_norm,
    buffers,
    convolution,
    native_batch_norm,
    random_numbers,
    sync,
)

__all__ = [
    "batch_norm",
    "buffers",
    "convolution",
    "native_batch_norm",
    "random_numbers",
    "sync",
]
