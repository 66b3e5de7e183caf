"""BatchNorm networks under torch.func, and the model comes back as it was.

Your own vmap, grad, jacrev or hessian of a network in training mode:

    with vmap_safe(model):                      # BatchNorm uses its running statistics
        rows = vmap(grad(loss), (None, 0, 0))(params, x, y)

Gradients of single samples, x (B, C, H, W), y (B,):

    per_sample_grads(model, F.cross_entropy, x, y)              # {name: (B, *shape)}
    per_sample_grad_norms(model, F.cross_entropy, x, y)         # (B,)
    clipped_grad_sum(model, F.cross_entropy, x, y, max_grad_norm=1.0)  # {name: shape}
    per_sample_sketch(model, F.cross_entropy, x, y, k=512)      # (B, 512)
    per_sample(model, F.cross_entropy, x, y, want={"gram": quantities.Gram()})
    over(loader, per_sample_sketch, model, F.cross_entropy).save(folder)

What is unsafe in a model, and what to do: print(check(model, x)).

``mode=`` says what a BatchNorm layer does: "eval" (the running statistics),
"no_running_stats" (the statistics of what one call under vmap sees), "group_norm"
(groups of channels of each sample), "sync" (the statistics of all samples, as in
training). help(vmap_safe) explains the modes and what a block covers; help(per_sample)
the options of all functions for samples; help(quantities) what can be wanted.

Other names: ``batched`` (a function of a batch, run on batches of one), ``covers``
(whether an open block makes a module safe, for libraries), ``convert`` and
``norm_layer`` (models without batch norm, for good), ``testing`` (for tests of rules
and of vmapped code), ``examples`` (programs to copy: python -m vmapsafe.examples.maml).
"""

# The map of the package, bottom up. Each file imports only from those above it. Each
# folder's docstring has the map of its own files.
#
# ``_errors``      errors and warnings: what was called, what was found, what to do
# ``_torch``       every private name of torch that the package uses
# ``_modes``       the four modes, and the options of a block
# ``_draws``       where torch's random generators stand
# ``_call``        one torch call, its arguments bound by name
# ``_rule``        what a torch call means when it sees a slice   <- start reading here
# ``rules/``       all that is known of a layer, a file a family
# ``_processes``   results of several processes, put together
# ``quantities/``  public: what can be wanted of per-sample gradients
# ``_block/``      ``vmap_safe``, ``batched``: rules in force, and the model put back
# ``_rows/``       per-sample gradients, and quantities of them, from one backward pass
# ``_data/``       ``over``: a whole data set, into files
# ``_convert``     ``convert`` and ``norm_layer``: permanent conversions
# ``_check/``      ``check``: a report of what is unsafe in a model
# ``testing``      public: what tests of rules and of vmapped code need
# ``examples/``    whole programs to copy
# ``__main__``     ``python -m vmapsafe``


from vmapsafe import quantities as quantities
from vmapsafe import rules as _rules
from vmapsafe._block.batched import batched as batched
from vmapsafe._block.covers import covers as covers
from vmapsafe._block.vmap_safe import vmap_safe as vmap_safe
from vmapsafe._check.check import check as check
from vmapsafe._convert import convert as convert
from vmapsafe._convert import norm_layer as norm_layer
from vmapsafe._data.over import over as over
from vmapsafe._errors import BlockError as BlockError
from vmapsafe._errors import FallbackWarning as FallbackWarning
from vmapsafe._errors import LeftOutWarning as LeftOutWarning
from vmapsafe._errors import MissingExtraError as MissingExtraError
from vmapsafe._errors import NeverUpdatedWarning as NeverUpdatedWarning
from vmapsafe._errors import VmapSafeError as VmapSafeError
from vmapsafe._errors import VmapSafeRuntimeError as VmapSafeRuntimeError
from vmapsafe._errors import VmapSafeTypeError as VmapSafeTypeError
from vmapsafe._errors import VmapSafeValueError as VmapSafeValueError
from vmapsafe._rows.per_sample import clipped_grad_sum as clipped_grad_sum
from vmapsafe._rows.per_sample import per_sample as per_sample
from vmapsafe._rows.per_sample import per_sample_grad_norms as per_sample_grad_norms
from vmapsafe._rows.per_sample import per_sample_grads as per_sample_grads
from vmapsafe._rows.per_sample import per_sample_sketch as per_sample_sketch

__version__ = "0.2.0"
__all__ = [
    "BlockError",
    "FallbackWarning",
    "LeftOutWarning",
    "MissingExtraError",
    "NeverUpdatedWarning",
    "VmapSafeError",
    "VmapSafeRuntimeError",
    "VmapSafeTypeError",
    "VmapSafeValueError",
    "batched",
    "check",
    "clipped_grad_sum",
    "convert",
    "covers",
    "norm_layer",
    "over",
    "per_sample",
    "per_sample_grad_norms",
    "per_sample_grads",
    "per_sample_sketch",
    "quantities",
    "vmap_safe",
]

# Pickles and tracebacks name what users import, and not the file it stands in.
for _name in {*__all__} - {"quantities"}:
    globals()[_name].__module__ = __name__
