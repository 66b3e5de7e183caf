"""What can be wanted of every sample's gradient, for ``per_sample``.

    from vmapsafe import per_sample, quantities as q
    found = per_sample(model, F.cross_entropy, x, y, want={
        "losses": q.Losses(),                # (B,)
        "norms": q.Norms(),                  # (B,)
        "sum": q.Sum(),                      # {name: shape}, the gradient of the sum
        "clipped": q.ClippedSum(1.0),        # {name: shape}
        "weighted": q.WeightedSum(weights),  # {name: shape}
        "squares": q.SumOfSquares(),         # {name: shape}
        "gram": q.Gram(),                    # (B, B)
        "dots": q.Dots(vectors),             # (B,) or (B, K)
        "sketch": q.Sketch(k=512),           # (B, k)
        "rows": q.Rows(),                    # {name: (B, *shape)}
    })

A quantity of one's own is a subclass of ``Quantity``, whose docstring says how.

The map, bottom up:

``protocol``     what a quantity is, and what it gets of each parameter
``norms``        losses and norms
``rows``         the gradients themselves
``sums``         sums: plain, weighted, clipped, of squares
``gram``         products of all pairs of samples
``dots``         products with given vectors
``signs``        matrices of random numbers, from a hash
``sketch``       random projections
"""

from vmapsafe.quantities.dots import Dots as Dots
from vmapsafe.quantities.gram import Gram as Gram
from vmapsafe.quantities.norms import Losses as Losses
from vmapsafe.quantities.norms import Norms as Norms
from vmapsafe.quantities.protocol import Block as Block
from vmapsafe.quantities.protocol import CallShape as CallShape
from vmapsafe.quantities.protocol import Collected as Collected
from vmapsafe.quantities.protocol import Grads as Grads
from vmapsafe.quantities.protocol import Looks as Looks
from vmapsafe.quantities.protocol import Paired as Paired
from vmapsafe.quantities.protocol import Part as Part
from vmapsafe.quantities.protocol import PerSample as PerSample
from vmapsafe.quantities.protocol import Quantity as Quantity
from vmapsafe.quantities.protocol import Summed as Summed
from vmapsafe.quantities.rows import Rows as Rows
from vmapsafe.quantities.sketch import Sketch as Sketch
from vmapsafe.quantities.sums import ClippedSum as ClippedSum
from vmapsafe.quantities.sums import Sum as Sum
from vmapsafe.quantities.sums import SumOfSquares as SumOfSquares
from vmapsafe.quantities.sums import WeightedSum as WeightedSum

__all__ = [
    "Block",
    "CallShape",
    "ClippedSum",
    "Collected",
    "Dots",
    "Gram",
    "Grads",
    "Looks",
    "Losses",
    "Norms",
    "Paired",
    "Part",
    "PerSample",
    "Quantity",
    "Rows",
    "Sketch",
    "Sum",
    "SumOfSquares",
    "Summed",
    "WeightedSum",
]
