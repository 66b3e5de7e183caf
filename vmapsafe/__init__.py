"""BatchNorm networks under torch.func, and the model comes back as it was.

The map of the package, bottom up; each file imports only from those above it:

``_errors``      how a failure is worded
``_groups``      how many groups a group norm makes of C channels
``_call``        one torch call, bound by name
``_memory``      large zeros
``_rule``        what a torch call means when it sees a slice   <- start reading here
``_here``        which blocks are open: in this thread, and anywhere
``_switched``    modules of classes that are half ours, while a block covers them
``_state``       what a block has to know of a model
``rules/``       the rules, a file a family
``_operators``   faster batching rules of operators, while a block is open
``_again``       what backward runs again: in the block it was made in, or refused
``_scope``       a block in force: which rules, which models, which thread
``_advice``      notes for errors of torch's vmap
``_wrap``        ``vmap_safe``
``_chunks``      samples a few at a time, and their random numbers
``_batched``     ``batched``
``_formulas``    rows of a weight, their norms and sums, from input and output gradient
``_copies``      a sample's own copy of each parameter, wherever one is read
``_record``      one forward and backward that finds those, layer by layer
``_samples``     model, loss and batch of a call, checked and bound
``_turns``       one call at a time on a model
``_processes``   results of several processes put together
``_per_sample``  per-sample gradients
``_norms``       their norms and clipped sums
``_sketch``      their random projections
``_disk``        results in files that grow, and go on after an interruption
``_over``        one of these for every batch of a DataLoader
``_convert``     permanent conversions, ``norm_layer``
``_report``      the findings of ``check``, and how they print
``_trial``       a copy of a model run on an example, and what that shows
``_check``       ``check``
``_demo``        the main job on real data, an example to copy
``examples/``    more of these, a file each
``__main__``     ``python -m vmapsafe``
"""

from vmapsafe import rules as _rules
from vmapsafe._batched import batched as batched
from vmapsafe._check import check as check
from vmapsafe._convert import convert as convert
from vmapsafe._convert import norm_layer as norm_layer
from vmapsafe._errors import BlockError as BlockError
from vmapsafe._errors import LeftOutWarning as LeftOutWarning
from vmapsafe._errors import NeverUpdatedWarning as NeverUpdatedWarning
from vmapsafe._norms import clipped_grad_sum as clipped_grad_sum
from vmapsafe._norms import per_sample_grad_norms as per_sample_grad_norms
from vmapsafe._over import over as over
from vmapsafe._per_sample import per_sample_grads as per_sample_grads
from vmapsafe._sketch import per_sample_sketch as per_sample_sketch
from vmapsafe._wrap import vmap_safe as vmap_safe

__version__ = "0.1.0"
__all__ = [
    "BlockError",
    "LeftOutWarning",
    "NeverUpdatedWarning",
    "batched",
    "check",
    "clipped_grad_sum",
    "convert",
    "norm_layer",
    "over",
    "per_sample_grad_norms",
    "per_sample_grads",
    "per_sample_sketch",
    "vmap_safe",
]
