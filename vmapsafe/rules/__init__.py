"""The rules, one file a family. Importing this package registers them, in order."""

from vmapsafe.rules import (
    attention,
    batch_norm,
    buffers,
    convolution,
    embedding,
    group_norm,
    layer_norm,
    layouts,
    linear,
    native_batch_norm,
    random_numbers,
    sync,
)

__all__ = [
    "attention",
    "batch_norm",
    "buffers",
    "convolution",
    "embedding",
    "group_norm",
    "layer_norm",
    "layouts",
    "linear",
    "native_batch_norm",
    "random_numbers",
    "sync",
]
