"""All that is known of a layer, a file a family. Importing this registers the rules.

The map, bottom up:

``memory``             large zeros that cost nothing where nobody writes
``regimes``            thresholds of the speed rules, by type of device
``batch_norm``         batch norm and instance norm, in every mode but "sync"
``native_batch_norm``  the operators of batch norm
``sync``               batch norm and instance norm across the vmapped axis
``group_norm``         group norm
``layer_norm``         layer norm
``linear``             linear layers
``convolution``        convolutions
``embedding``          embeddings
``attention``          scaled dot product attention
``buffers``            writes to buffers, which a forward in a block leaves out
``layouts``            orders in memory that vmap cannot make or ask for
``random_numbers``     memory for random numbers
"""

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
