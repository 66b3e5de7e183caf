"""What is measured: every way to a result, under the name that the tables give it.

A contender is a function of a ``Workload``. It prepares what a training script would
prepare once, and returns the function to time. ``TASKS`` groups contenders by what they
compute. A contender imports its library itself. If the library is not installed, or if
it refuses the network, the contender raises an error, and the error's first line is
reported in its place.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import json
import os
import subprocess
import sys
import tempfile
import warnings
from functools import cached_property
from pathlib import Path

import numpy
import torch
import torch.nn.functional as F
from networks import GROWN, NETWORKS, usual_batch
from torch import nn
from torch.func import (
    functional_call,
    grad,
    replace_all_batch_norm_modules_,
    vmap,
)

import vmapsafe

PRECISIONS = ("fp32", "tf32", "bf16")


class Workload:
    """A network with running statistics of its own, in training mode, and a batch.

    Args:
        net: a key of ``NETWORKS`` or ``GROWN``.
        batch: the number of samples, by default the usual one.
        dtype: float64 to compare answers, float32 to measure time.
        device: the device of the network and the batch.
        precision: "bf16" is autocast, and "tf32" is a setting of the process; see
            ``arithmetic``, in which contenders run.
        options: for contenders in other processes, such as "jax_python".
    """

    def __init__(
        self,
        net,
        batch=None,
        dtype=torch.float32,
        device="cpu",
        precision="fp32",
        **options,
    ):
        make, (_, *shape) = {**NETWORKS, **GROWN}[net]
        self.net, self.batch = net, batch or usual_batch(net, device)
        self.dtype, self.device, self.precision = dtype, device, precision
        self.options = options
        torch.compiler.reset()  # forget what was compiled for an earlier workload
        torch.manual_seed(0)
        model = make()
        with torch.no_grad():
            model(torch.randn(64, *shape))
        self.model = model.to(device, dtype)
        self.x = torch.randn(self.batch, *shape).to(device, dtype)
        self.y = torch.randint(3, (self.batch,)).to(device)

    @cached_property
    def switched(self):
        """The model as used without vmapsafe: its BatchNorm layers are in eval mode."""
        model = copy.deepcopy(self.model)
        for layer in _batch_norms(model):
            layer.eval()
        return model

    @cached_property
    def params(self):
        return {name: p.detach() for name, p in self.switched.named_parameters()}

    @property
    def numbers(self):
        """How many numbers the per-sample gradients are, B x P."""
        return self.batch * sum(p.numel() for p in self.model.parameters())

    @cached_property
    def max_grad_norm(self):
        """A bound that clips half of the samples."""
        return float(norms(loop(self)()).median())

    @cached_property
    def vectors(self):
        """Ten vectors, {name: (10, *shape)}."""
        generator = torch.Generator().manual_seed(1)
        return {
            name: torch.randn(10, *p.shape, generator=generator).to(p)
            for name, p in self.params.items()
        }

    @contextlib.contextmanager
    def arithmetic(self):
        """What the precision asked for means to torch."""
        before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
        matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
        matmul.allow_tf32 = cudnn.allow_tf32 = self.precision == "tf32"
        low = self.precision == "bf16" and self.dtype == torch.float32
        try:
            with torch.autocast(self.device, torch.bfloat16, enabled=low):
                yield
        finally:
            matmul.allow_tf32, cudnn.allow_tf32 = before


def _batch_norms(model):
    kind = nn.modules.batchnorm._BatchNorm
    return [module for module in model.modules() if isinstance(module, kind)]


# ------------------------------------------------------- yardsticks and the reference


def plain(w):
    """One forward and one backward for the whole batch."""
    leaves = list(w.switched.parameters())

    def run():
        loss = F.cross_entropy(w.switched(w.x), w.y, reduction="sum")
        return torch.autograd.grad(loss, leaves)

    return run


def floor(w):
    """``plain``, and as many numbers written to fresh memory as the rows have.

    The tensors have the shapes of the rows, because the time that an allocator takes
    depends on the size.
    """
    gradient, shapes = plain(w), [(w.batch, *p.shape) for p in w.model.parameters()]

    def run():
        # Both are alive at the same time, as gradients of activations and rows are.
        return gradient(), [w.x.new_empty(shape).fill_(1.0) for shape in shapes]

    return run


def plain_compiled(w):
    """The same by ``torch.func.grad``, compiled."""

    def loss(params, x, y):
        out = functional_call(w.switched, params, (x,))
        return F.cross_entropy(out, y, reduction="sum")

    gradient = torch.compile(grad(loss))
    return lambda: gradient(w.params, w.x, w.y)


def floor_reused(w):
    gradient, memory = plain(w), floor(w)()[1]

    def run():
        return gradient(), [rows.fill_(1.0) for rows in memory]

    return run


def loop(w, model=None):
    """One sample after the other, into one result, which all others must equal."""
    model = copy.deepcopy(model or w.switched)
    names, leaves = zip(*model.named_parameters())
    # The gradient that reaches a layer is made contiguous. If it is not contiguous,
    # torch's batch_norm backward on a CPU is wrong for a batch of one.
    for layer in _batch_norms(model):
        layer.register_forward_hook(_contiguous_gradient)

    def run():
        rows = {n: p.new_empty(w.batch, *p.shape) for n, p in zip(names, leaves)}
        for i in range(w.batch):
            loss = F.cross_entropy(model(w.x[i, None]), w.y[i, None])
            for row, gradient in zip(
                rows.values(), torch.autograd.grad(loss, leaves), strict=True
            ):
                row[i] = gradient
        return rows

    return run


def _contiguous_gradient(module, args, out):
    if out.requires_grad:
        out.register_hook(lambda gradient: gradient.contiguous())


# ----------------------------------------------------------------------- torch's own


def by_vmap(w, model=None, then=None, compiled=None):
    """``vmap(grad)``. ``then`` is applied to the rows, and compiled with them.

    Args:
        compiled: ``inductor`` or ``cuda_graph``, or None to run it as it is.
    """
    model = model or w.switched
    params = {name: p.detach() for name, p in model.named_parameters()}

    def sample_loss(params, x, y):
        out = functional_call(model, params, (x.unsqueeze(0),))
        return F.cross_entropy(out, y.unsqueeze(0))

    rows = vmap(grad(sample_loss), (None, 0, 0))

    def call(params, x, y):
        return then(rows(params, x, y)) if then else rows(params, x, y)

    if compiled:
        call = compiled(w, call)
    return lambda: call(params, w.x, w.y)


def inductor(w, function):
    return torch.compile(function)


def cuda_graph(w, function):
    """Compiled, with all kernels recorded once and then started at once.

    The answer lies in memory that the next call overwrites.
    """
    if w.device != "cuda":
        raise NotImplementedError("a CUDA graph needs a GPU")
    compiled = torch.compile(function, mode="reduce-overhead")

    def call(*args):
        torch.compiler.cudagraph_mark_step_begin()
        return compiled(*args)

    return call


def replaced(w):
    """A different network: it normalises each sample by its own statistics."""
    if not _batch_norms(w.model):
        raise ValueError("there is no BatchNorm to replace")
    return replace_all_batch_norm_modules_(copy.deepcopy(w.model))


def expanded_weights(w):
    from torch.nn.utils._per_sample_grad import call_for_per_sample_grads

    model = copy.deepcopy(w.switched)
    per_sample = call_for_per_sample_grads(model, loss_reduction="sum")

    def run():
        F.cross_entropy(per_sample(w.x), w.y, reduction="sum").backward()
        return _taken(model, "grad_sample")

    return run


# --------------------------------------------------------------------------- vmapsafe


def ours(w, **options):
    return lambda: vmapsafe.per_sample_grads(
        w.model, F.cross_entropy, w.x, w.y, **options
    )


def our_rows_compiled(w):
    return _of_the_batch(w, vmapsafe.per_sample_grads, inductor, fast=True)


def ours_reused(w):
    """Writes the rows to memory that the caller keeps."""
    if "out" not in inspect.signature(vmapsafe.per_sample_grads).parameters:
        raise NotImplementedError("not there yet: per_sample_grads has no out=")
    memory = {n: p.new_empty(w.batch, *p.shape) for n, p in w.params.items()}
    return ours(w, fast=True, out=memory)


def in_block(w, compiled=None):
    """A user's own ``vmap(grad)`` in a block.

    The block is around a compiled call, so that its rules apply when it traces.
    """
    rows = by_vmap(w, w.model, compiled=compiled)

    def run():
        with vmapsafe.vmap_safe(w.model, fast=True):
            return rows()

    return run


def our_norms(w, compiled=None):
    reduce = _ours_or_nothing("per_sample_grad_norms")
    return _of_the_batch(w, reduce, compiled, fast=True)


def our_clipped_sum(w, compiled=None):
    reduce = _ours_or_nothing("clipped_grad_sum")
    options = {"max_grad_norm": w.max_grad_norm, "fast": True}
    return _of_the_batch(w, reduce, compiled, **options)


def _of_the_batch(w, reduce, compiled, **options):
    def call(x, y):
        return reduce(w.model, F.cross_entropy, x, y, **options)

    if compiled:
        call = compiled(w, call)
    return lambda: call(w.x, w.y)


def _ours_or_nothing(name):
    function = getattr(vmapsafe, name, None)
    if function is None:
        raise NotImplementedError(f"not there yet: vmapsafe has no {name}")
    return function


# ----------------------------------------------------------------------------- peers


def opacus(w, **options):
    """Hooks on the layers; ``force_functorch`` selects Opacus' other way."""
    from opacus import GradSampleModule

    model = copy.deepcopy(w.switched)
    hooked = GradSampleModule(model, loss_reduction="sum", **options)

    def run():
        F.cross_entropy(hooked(w.x), w.y, reduction="sum").backward()
        return _taken(model, "grad_sample")

    return run


def _ghost(w, model, bound):
    from opacus.grad_sample import GradSampleModuleFastGradientClipping

    return GradSampleModuleFastGradientClipping(
        model, loss_reduction="sum", max_grad_norm=bound, use_ghost_clipping=True
    )


def ghost_norms(w):
    model = copy.deepcopy(w.switched)
    hooked = _ghost(w, model, 1.0)

    def run():
        F.cross_entropy(hooked(w.x), w.y, reduction="sum").backward()
        result = hooked.get_norm_sample()
        hooked.zero_grad()
        return result

    return run


def ghost_clipped_sum(w):
    """Two backward passes. The second is of the losses scaled by the clip factors."""
    model = copy.deepcopy(w.switched)
    hooked = _ghost(w, model, w.max_grad_norm)

    def run():
        hooked.enable_hooks()
        losses = F.cross_entropy(hooked(w.x), w.y, reduction="none")
        losses.sum().backward(retain_graph=True)
        factors = hooked.get_clipping_coef()
        hooked.zero_grad()
        hooked.disable_hooks()
        (factors * losses).sum().backward()
        return _taken(model, "grad")

    return run


def backpack(w, extension="BatchGrad", attribute="grad_batch"):
    """BackPACK, without its converter if the network is a Sequential of layers."""
    from backpack import backpack, extend, extensions

    model = copy.deepcopy(w.switched)
    names = {id(p): name for name, p in model.named_parameters()}
    layers_only = all(type(m).__module__.startswith("torch.") for m in model.modules())
    extended = extend(model, use_converter=not layers_only)
    loss_fn = extend(nn.CrossEntropyLoss(reduction="sum"))
    quantity = getattr(extensions, extension)

    def run():
        with backpack(quantity()), warnings.catch_warnings():
            # It skips a layer that it does not know.
            warnings.filterwarnings("error", "Extension saving to")
            loss_fn(extended(w.x), w.y).backward()
        return _taken(extended, attribute, names)

    return run


def batch_l2(w):
    squares = backpack(w, "BatchL2Grad", "batch_l2")
    return lambda: torch.stack(list(squares().values())).sum(0).sqrt()


def _taken(model, attribute, names=None):
    """Every parameter's attribute, which is removed from it, together with ``grad``."""
    found = {}
    for name, p in model.named_parameters():
        found[names[id(p)] if names else name] = getattr(p, attribute)
        if attribute == "grad_sample":
            p.grad_sample = None
        elif attribute != "grad":
            delattr(p, attribute)
        p.grad = None
    return found


class Jax:
    """jit(vmap(grad)) in its own process, which takes part in every round.

    ``__call__`` returns its answer as torch tensors, ``seconds`` the time that its own
    clock measured.
    """

    def __init__(self, w, task):
        python = w.options.get("jax_python") or os.environ.get("VMAPSAFE_JAX_PYTHON")
        if w.net not in ("BN MLP", "small CNN", "conv1d net", "ResNet-18"):
            raise NotImplementedError(f"jax_rows.py has no {w.net}")
        if w.precision == "bf16":
            raise NotImplementedError("bf16 autocast has no counterpart in jax_rows.py")
        self.task, self.folder = task, tempfile.TemporaryDirectory()
        batch = Path(self.folder.name, "batch.npz")
        state = {f"net/{n}": t for n, t in w.switched.state_dict().items()}
        given = {**state, "x": w.x, "y": w.y}
        numpy.savez(batch, **{n: t.cpu().numpy() for n, t in given.items()})
        script = Path(__file__).with_name("jax_rows.py")
        bound = w.max_grad_norm if task == "clipped sum" else 1.0
        self.process = subprocess.Popen(
            [python or sys.executable, str(script), w.net, str(batch), task]
            + [str(bound), w.device, w.precision, str(torch.get_num_threads())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            self._heard()
        except RuntimeError:
            self.close()
            raise

    def __call__(self):
        path = Path(self.folder.name, "answer.npz")
        self._asked(save=str(path))
        with numpy.load(path) as saved:
            answer = {name: torch.from_numpy(saved[name]) for name in saved}
        return answer.get("", answer)

    def seconds(self, number):
        return self._asked(number=number)["seconds"]

    def peak(self):
        return self._asked()["peak"]

    def close(self):
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait()
        self.folder.cleanup()

    def _asked(self, **what):
        print(json.dumps(what), file=self.process.stdin, flush=True)
        return self._heard()

    def _heard(self):
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"jax_rows.py ended with status {self.process.wait()}")
        heard = json.loads(line)
        if "refused" in heard:
            raise RuntimeError(heard["refused"])
        return heard


# ---------------------------------------------------------------------------- forward


def forward(w, function=None):
    """The whole batch merged, in one call."""

    @torch.no_grad()
    def run():
        return (function or w.switched)(w.x)

    return run


def forward_by_vmap(w):
    function = vmap(w.switched)
    return forward(w, lambda x: function(x.unsqueeze(1)).squeeze(1))


def our_forward(w, **options):
    function = vmap(w.model)

    def blocked(x):
        with vmapsafe.vmap_safe(w.model, **options):
            return function(x.unsqueeze(1)).squeeze(1)

    return forward(w, blocked)


# ---------------------------------------------------------------- entering and leaving


def eval_and_train(w):
    def run():
        w.model.eval()
        w.model.train()

    return run


def block(w, **options):
    def run():
        with vmapsafe.vmap_safe(w.model, **options):
            pass

    return run


# ------------------------------------------------------------------------- reductions


def norms(rows):
    """The norm of each sample's whole gradient, (B,)."""
    squares = [g.flatten(1).square().sum(1) for g in rows.values()]
    return torch.stack(squares).sum(0).sqrt()


def clipped_sum(rows, bound):
    factors = (bound / norms(rows)).clamp(max=1.0)
    return {
        name: torch.tensordot(factors.to(g.dtype), g, 1) for name, g in rows.items()
    }


def _then_norms(build):
    return lambda w: _composed(norms, build(w))


def _then_clipped(build):
    return lambda w: _composed(
        lambda rows, bound=w.max_grad_norm: clipped_sum(rows, bound), build(w)
    )


def _clipped_by_vmap(w, compiled):
    bound = w.max_grad_norm
    return by_vmap(w, then=lambda rows: clipped_sum(rows, bound), compiled=compiled)


def _composed(reduce, run):
    return lambda: reduce(run())


# ------------------------------------------------------------- quantities of the rows


def per_sample(w, want):
    _ours_or_nothing("per_sample")

    def run():
        return vmapsafe.per_sample(w.model, F.cross_entropy, w.x, w.y, want=want)

    return run


def several(w):
    """Norms, sum and losses, in one dict of tensors."""
    q = vmapsafe.quantities
    want = {"norms": q.Norms(), "sum": q.Sum(), "losses": q.Losses()}
    run = per_sample(w, want)

    def flat():
        found = run()
        return {**found.pop("sum"), **found}

    return flat


def reduced_to_several(w, rows):
    """The same of rows; losses take a forward of their own."""
    with torch.no_grad():
        losses = F.cross_entropy(w.switched(w.x), w.y, reduction="none")
    sums = {name: g.sum(0) for name, g in rows.items()}
    return {**sums, "norms": norms(rows), "losses": losses}


def gram(rows):
    """The products of all pairs of samples, (B, B)."""
    return sum(g.flatten(1) @ g.flatten(1).T for g in rows.values())


def dots(rows, vectors):
    """The products with the vectors, (B, K)."""
    flat = [(g.flatten(1), vectors[name].flatten(1)) for name, g in rows.items()]
    return sum(g @ v.T for g, v in flat)


def batch_dot(w):
    products = backpack(w, "BatchDotGrad", "batch_dot")
    return lambda: sum(products().values())


def _quantity(wanted, reduce, **peers):
    """The contenders for a quantity: ours, and what users do without it.

    Args:
        wanted: of the workload.
        reduce: of the workload and the rows.
        peers: more contenders.
    """

    def of(rows):
        def build(w):
            run = rows(w)
            return lambda: reduce(w, run())

        return build

    return {
        "plain": plain,
        "loop": of(loop),
        "vmapsafe": wanted,
        "vmapsafe, rows reduced": of(lambda w: ours(w, fast=True)),
        "vmap(grad)": of(by_vmap),
        **peers,
    }


QUANTITIES = {
    "norms, sum and losses": _quantity(several, reduced_to_several),
    "sum of squares": _quantity(
        lambda w: per_sample(w, vmapsafe.quantities.SumOfSquares()),
        lambda w, rows: {name: g.square().sum(0) for name, g in rows.items()},
        **{
            "BackPACK SumGradSquared": lambda w: backpack(
                w, "SumGradSquared", "sum_grad_squared"
            )
        },
    ),
    "Gram matrix": _quantity(
        lambda w: per_sample(w, vmapsafe.quantities.Gram()),
        lambda w, rows: gram(rows),
        **{"BackPACK BatchDotGrad": batch_dot},
    ),
    "dots with 1 vector": _quantity(
        lambda w: per_sample(w, vmapsafe.quantities.Dots(_first(w.vectors, 1))),
        lambda w, rows: dots(rows, _first(w.vectors, 1)),
    ),
    "dots with 10 vectors": _quantity(
        lambda w: per_sample(w, vmapsafe.quantities.Dots(w.vectors)),
        lambda w, rows: dots(rows, w.vectors),
    ),
    "sketch": {
        "plain": plain,
        "vmapsafe": lambda w: per_sample(w, vmapsafe.quantities.Sketch(512)),
        "vmapsafe, kronecker": lambda w: per_sample(
            w, vmapsafe.quantities.Sketch(512, "kronecker")
        ),
    },
}


def _first(vectors, count):
    return {name: v[:count] for name, v in vectors.items()}


# ------------------------------------------------------------------------- the tables

ROWS = {
    "plain": plain,
    "plain, compiled": plain_compiled,
    "floor": floor,
    "floor, reused": floor_reused,
    "loop": loop,
    "vmapsafe": lambda w: ours(w, fast=True),
    "vmapsafe, fast=False": lambda w: ours(w, fast=False),
    "vmapsafe, out=": ours_reused,
    "vmapsafe, compiled": our_rows_compiled,
    "vmapsafe, CUDA graph": lambda w: in_block(w, cuda_graph),
    "vmap(grad) in a block": in_block,
    "vmap(grad) in a block, compiled": lambda w: in_block(w, inductor),
    "vmap(grad)": by_vmap,
    "vmap(grad), compiled": lambda w: by_vmap(w, compiled=inductor),
    "vmap(grad), CUDA graph": lambda w: by_vmap(w, compiled=cuda_graph),
    "vmap(grad), BN replaced": lambda w: by_vmap(w, replaced(w)),
    "Opacus hooks": opacus,
    "Opacus functorch": lambda w: opacus(w, force_functorch=True),
    "ExpandedWeights": expanded_weights,
    "BackPACK": backpack,
    "JAX plain": lambda w: Jax(w, "plain"),
    "JAX": lambda w: Jax(w, "rows"),
}

NORMS = {
    "plain": plain,
    "plain, compiled": plain_compiled,
    "loop": _then_norms(loop),
    "vmapsafe": our_norms,
    "vmapsafe, compiled": lambda w: our_norms(w, inductor),
    "vmapsafe, CUDA graph": lambda w: our_norms(w, cuda_graph),
    "vmapsafe, rows reduced": _then_norms(ROWS["vmapsafe"]),
    "vmap(grad)": _then_norms(by_vmap),
    "vmap(grad), compiled": lambda w: by_vmap(w, then=norms, compiled=inductor),
    "vmap(grad), CUDA graph": lambda w: by_vmap(w, then=norms, compiled=cuda_graph),
    "Opacus ghost clipping": ghost_norms,
    "BackPACK BatchL2Grad": batch_l2,
    "JAX plain": lambda w: Jax(w, "plain"),
    "JAX": lambda w: Jax(w, "norms"),
}

CLIPPED = {
    "plain": plain,
    "plain, compiled": plain_compiled,
    "loop": _then_clipped(loop),
    "vmapsafe": our_clipped_sum,
    "vmapsafe, compiled": lambda w: our_clipped_sum(w, inductor),
    "vmapsafe, CUDA graph": lambda w: our_clipped_sum(w, cuda_graph),
    "vmapsafe, rows reduced": _then_clipped(ROWS["vmapsafe"]),
    "vmap(grad)": _then_clipped(by_vmap),
    "vmap(grad), compiled": lambda w: _clipped_by_vmap(w, inductor),
    "vmap(grad), CUDA graph": lambda w: _clipped_by_vmap(w, cuda_graph),
    "Opacus hooks": _then_clipped(opacus),
    "Opacus ghost clipping": ghost_clipped_sum,
    "BackPACK": _then_clipped(backpack),
    "JAX plain": lambda w: Jax(w, "plain"),
    "JAX": lambda w: Jax(w, "clipped sum"),
}

FORWARD = {
    "plain": forward,
    "vmapsafe": lambda w: our_forward(w, fast=True),
    "vmapsafe, fast=False": lambda w: our_forward(w, fast=False),
    "vmap": forward_by_vmap,
}

BLOCK = {
    "plain": eval_and_train,
    "vmapsafe": lambda w: block(w, fast=True),
    "vmapsafe, fast=False": lambda w: block(w, fast=False),
    'vmapsafe, mode="sync"': lambda w: block(w, mode="sync"),
}

TASKS = {
    "rows": ROWS,
    "norms": NORMS,
    "clipped sum": CLIPPED,
    "forward": FORWARD,
    "block": BLOCK,
    **QUANTITIES,
}

# What each answer is compared with. The yardsticks are not compared.
REFERENCES = {
    "rows": loop,
    "norms": NORMS["loop"],
    "clipped sum": CLIPPED["loop"],
    "forward": forward,
    **{task: found["loop"] for task, found in QUANTITIES.items() if "loop" in found},
}
# Their rounding differs, so they are only compared in the precision that is timed.
COMPILED = tuple(
    name
    for table in (ROWS, NORMS, CLIPPED)
    for name in table
    if name.endswith((", compiled", ", CUDA graph"))
)
YARDSTICKS = ("plain", "plain, compiled", "floor", "floor, reused", "JAX plain")
OTHER_MEANING = {"vmap(grad), BN replaced": lambda w: loop(w, replaced(w))}
