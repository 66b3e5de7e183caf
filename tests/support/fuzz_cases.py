"""What the fuzzer draws from a seed, and what it asks of the library with it."""

import contextlib
import copy
import functools
import random
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from blocks import MODES
from fuzz_nets import Builder, HandMade
from fuzz_reference import total_of
from measured import change_regimes, take_every_size, take_regimes_of_a_gpu
from plain import ModeName
from torch import Tensor, nn
from torch.func import (
    functional_call,
    grad,
    hessian,
    jacfwd,
    jacrev,
    jvp,
    stack_module_state,
    vjp,
    vmap,
)
from torch.nn.modules.batchnorm import _NormBase
from wanted import Cosine

import vmapsafe
from vmapsafe import batched
from vmapsafe import quantities as q
from vmapsafe import vmap_safe
from vmapsafe._block.vmap_safe import Block
from vmapsafe._rows.chunks import ChunkSize
from vmapsafe.quantities.sketch import KINDS

OUTS = 3

Values = dict[str, Tensor]

# What is asked, and how often.
SHORT = {"rows": 7, "norms": 4, "clipped": 3, "sketch": 2}
QUANTITIES = {"quantities": 9, "quantities of slices": 3}
SHORT.update(QUANTITIES)
OTHERS = {
    "vmap": 3,
    "vmap of vmap": 1,
    "vmap of grad": 5,
    "vmap of jvp": 1,
    "vmap of jacrev": 1,
    "vmap of hessian": 1,
    "grad of vmap": 2,
    "jvp of vmap": 1,
    "jacrev of vmap": 1,
    "jacfwd of vmap": 1,
    "hessian of vmap": 1,
    "backward": 1,
    "grad": 1,
    "jvp": 1,
    "jacrev": 1,
    "jacfwd": 1,
    "hessian": 1,
    "ensemble": 2,
    "ensemble of slices": 1,
    "ensemble of grad": 2,
    "jvp of jvp": 1,
    "grad of jvp": 1,
    "grad of adapted": 1,
    "jacrev of rows": 1,
    "jacfwd of rows": 1,
    "rows pulled back": 1,
    "converted": 1,
    "batched": 1,
    "batched grad": 1,
    "grad of rows": 2,
    "backward of rows": 1,
}
WITH_DROPOUT = (*SHORT, "vmap", "vmap of grad")
WITH_UPDATES = (*SHORT, "vmap", "vmap of grad", "grad of vmap", "grad", "backward")
FIRST_ORDER = (*WITH_UPDATES, "vmap of vmap", "batched", "batched grad", "ensemble")
FIRST_ORDER += ("ensemble of grad", "converted")
# torch's functional_call does not put back a module that has two names.
NAMED_TWICE = (*SHORT, "vmap", "vmap of vmap", "backward", "batched")
IN_CHUNKS = (*WITH_DROPOUT, "batched", "batched grad", "backward of rows")
ONE_SLICE = ("backward", "grad", "jvp", "jacrev", "jacfwd", "hessian")
OF_ONE = (
    *(what for what in SHORT if what != "quantities of slices"),
    "batched",
    "batched grad",
    "grad of rows",
    "backward of rows",
)
# -- Inputs ----------------------------------------------------------------------------


def laid_out(x: Tensor, rng: random.Random) -> tuple[Tensor, str]:
    """The values in another format, and its name; "expanded" has other values."""
    if not x.numel():
        return x, "empty"
    kind = rng.choice(
        ("", "channels_last", "permuted", "expanded", "strided", "offset")
    )
    if kind == "channels_last" and x.dim() >= 4:
        first = list(range(x.dim()))
        order = [*first[:-3], *first[-2:], first[-3]]
        return permuted(x, order), kind
    if kind == "permuted":
        order = list(range(x.dim()))
        rng.shuffle(order)
        return permuted(x, order), f"stored as {order}"
    if kind == "expanded":
        d = rng.randrange(min(x.dim(), 2))
        return x.narrow(d, 0, 1).expand(x.shape), f"expanded along {d}"
    if kind == "strided":
        d = rng.randrange(x.dim())
        longer = x.repeat_interleave(2, d).movedim(d, 0)
        return longer[::2].movedim(0, d), f"every second along {d}"
    if kind == "offset":
        return torch.cat([x[:1], x])[1:], kind
    return x, "contiguous"


def permuted(x: Tensor, order: list[int]) -> Tensor:
    back = [order.index(d) for d in range(x.dim())]
    return x.permute(order).contiguous().permute(back)


def tuned(net: nn.Module, rng: random.Random) -> None:
    """Weights and statistics that are not those of a new network."""
    for p in net.parameters():
        p.data.add_(0.2 * torch.randn_like(p))
    for m in net.modules():
        if isinstance(m, _NormBase) and m.running_mean is not None:
            assert m.running_var is not None and m.num_batches_tracked is not None
            m.running_mean.copy_(0.5 * torch.randn_like(m.running_mean))
            m.running_var.copy_(0.5 + torch.rand_like(m.running_var))
            m.num_batches_tracked.fill_(3)


# -- A case ----------------------------------------------------------------------------


class Case:
    """All that is drawn, from one seed."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.rng = rng = random.Random(seed)
        torch.manual_seed(seed)
        asked = {**SHORT, **OTHERS}
        self.what = rng.choices(list(asked), list(asked.values()))[0]
        self.mode: ModeName = rng.choice(MODES)
        if self.what == "grad of adapted" and self.mode == "sync":
            self.mode = "eval"  # its first forward would mix the tasks
        if self.what == "converted":
            self.mode = rng.choice(("no_running_stats", "group_norm"))
        # Most of these run as one batch without vmap.
        self.usual = self.what in SHORT and rng.random() < 0.4
        if self.usual:
            self.mode = "eval"
        first_order = self.what in WITH_DROPOUT
        self.dtype = torch.float64
        if first_order and rng.random() < 0.25:
            self.dtype = rng.choice((torch.float32, torch.bfloat16))
        self.autocast = first_order and not self.usual and rng.random() < 0.07
        if self.autocast:
            self.dtype = torch.float32
        self.fast = self.usual or rng.random() < 0.7
        algorithms = "products", "turned products", "sums"
        self.regimes = rng.choice(("", "", *algorithms, "gpu"))
        self.num_groups = rng.choice((1, 1, 2, 2, 3, 32, _one_each, _halves))
        dropout = self.what in WITH_DROPOUT and rng.random() < 0.15
        self.randomness = rng.choice(("same", "different")) if dropout else "error"
        self._draw_net(dropout)
        self._draw_batch()
        self._draw_options()

    # -- Draws -------------------------------------------------------------------------

    def _draw_net(self, dropout: bool) -> None:
        rng = self.rng
        builder = Builder(
            rng,
            precise=self.dtype == torch.float64,
            first_order=self.what in FIRST_ORDER,
            named_twice=self.what in NAMED_TWICE,
            may_bound=self.what in SHORT,
            hand_made=self.what != "converted",
            usual=self.usual,
        )
        net, self.shape, self.words = builder.net(OUTS, dropout)
        self.net = net.to(self.dtype)
        self.dropout = dropout
        tuned(self.net, rng)
        if rng.random() < 0.25:
            self.net.eval()
        else:
            for m in self.net.modules():
                if isinstance(m, _NormBase) and rng.random() < 0.15:
                    m.eval()  # frozen by its owner
        params = dict(self.net.named_parameters())
        for p in params.values():
            p.requires_grad_(rng.random() < 0.9)
        if not any(p.requires_grad for p in params.values()):
            rng.choice(list(params.values())).requires_grad_()
        self.weights = rng.choice(("", "", "", "channels_last", "permuted"))
        if self.weights == "channels_last":
            for p in params.values():
                order = list(range(p.dim()))
                if len(order) > 3:
                    p.data = permuted(p.data, [order[0], *order[2:], order[1]])
        if self.weights == "permuted":
            for p in params.values():
                p.data = permuted(p.data, list(range(p.dim()))[::-1])
        if rng.random() < 0.3:
            for p in params.values():
                p.grad = torch.ones_like(p)

    def _draw_batch(self) -> None:
        rng = self.rng
        self.size = rng.choice((1, 2, 3, 3, 5))
        if self.what in SHORT and rng.random() < 0.03:
            self.size = 0
        elif self.what in SHORT and len(self.shape) == 1 and rng.random() < 0.05:
            self.size = 70  # more than a sketch takes at a time
        self.each = 1 if self.what in OF_ONE else rng.choice((1, 2, 2, 3, 4))
        shape = (self.size, *self.shape)
        if self.what not in OF_ONE:
            shape = (self.size, self.each, *self.shape)
        if self.what == "vmap of vmap":
            shape = (2, *shape)
        if self.words:
            x = torch.randint(self.words, shape)
            another = torch.randint(self.words, shape)
        else:
            x = (torch.randn(shape).double() * 1.5 + 0.3).to(self.dtype)
            another = torch.randn(shape).to(self.dtype)
        self.x, self.x_format = laid_out(x, rng)
        self.another, _ = laid_out(another, rng)
        heads = shape[: len(shape) - len(self.shape)]
        self.loss = rng.choice(("cross entropy", "squares", "sine", "none"))
        if self.loss == "none" and (self.what not in SHORT or self.each != 1):
            self.loss = "squares"
        if self.loss in ("cross entropy", "none"):
            self.y, self.y_format = laid_out(torch.randint(OUTS, heads), rng)
        else:
            y = torch.randn(*heads, OUTS).to(self.dtype)
            self.y, self.y_format = laid_out(y, rng)
        self.scale, _ = laid_out((torch.rand(heads) + 0.5).to(self.dtype), rng)

    def _draw_options(self) -> None:
        rng = self.rng
        short = self.what in SHORT
        self.hand_made = any(isinstance(m, HandMade) for m in self.net.modules())
        self.around = rng.choice(("",) * 6 + ("no_grad", "another block"))
        self.by_decorator = rng.random() < 0.2
        self.out_dim = rng.choice((0, 0, 1, -1))
        self.chunk_size: ChunkSize = rng.choice((None, None, 1, 2, 7))
        if self.what not in IN_CHUNKS:
            self.chunk_size = None
        if short and rng.random() < (0.02 if self.mode == "sync" else 0.2):
            self.chunk_size = "auto"
        self.inputs = rng.choice(("x", "x", "x", "tuple", "dict")) if short else "x"
        self.rows = "contribution"
        if short and self.mode == "sync" and self.what in OF_ONE:
            self.rows = rng.choice(("contribution", "jacobian", "detached"))
        self.has_aux = self.dropout or (short and rng.random() < 0.2)
        self.regularised = short and rng.random() < 0.1
        self.twice = short and not self.dropout and rng.random() < 0.1
        self.out = self.what == "rows" and rng.random() < 0.2
        self.updates = (
            self.mode == "sync"
            and self.what in WITH_UPDATES
            and not self.dropout
            and not self.hand_made
            and rng.random() < 0.3
        )
        own = dict(self.net.named_parameters())
        names = list(own)
        self.given = rng.choice(("all", "all", "names", "dict"))
        if self.usual and rng.random() < 0.8:
            self.given = "all"
        if short and rng.random() < 0.07:
            self.given = "state"
        if self.updates:
            self.given = rng.choice(("all", "names"))
        if self.given in ("all", "state") and short:
            self.names = [n for n in names if own[n].requires_grad]
        elif self.given == "all":
            self.names = names
        else:
            self.names = rng.sample(names, rng.randint(1, len(names)))
        if {*self.names} == {*self.net.state_dict()}:  # a dict of all is a state dict
            self.names = [n for n in names if own[n].requires_grad]
        self.values = {n: p.detach() for n, p in own.items()}
        if self.given == "dict" and self.what in SHORT:
            for n in self.names:
                moved = own[n].detach() + 0.1 * torch.randn_like(own[n])
                self.values[n] = laid_out(moved, rng)[0] if moved.dim() else moved
        self.state = self._another_state() if self.given == "state" else {}
        if self.state:
            self.values = {n: self.state[n] for n in names}
        self.heated = short and rng.random() < 0.05
        # Rows whose squares are no numbers any more.
        self.factor = 1.0
        if self.what in ("norms", "clipped") and rng.random() < 0.1:
            extremes = {torch.float32: (1e-25, 1e18), torch.float64: (1e-170, 1e160)}
            self.factor = rng.choice(extremes.get(self.dtype, (1.0,)))
        if self.autocast or self.regularised or self.twice:
            self.factor = 1.0
        self.per_parameter = rng.random() < 0.5
        self.max_grad_norm = rng.choice((0.01, 0.3, 3.0, 1e9))
        self.k, self.kind = rng.choice((3, 70)), rng.choice(
            ("rademacher", "gaussian", "kronecker")
        )
        self.in_dim = rng.choice((0, 0, 1)) if self.what not in OF_ONE else 0
        self.watched = short and not self.words and rng.random() < 0.1
        self.sync_levels = None
        if self.what == "vmap of vmap" and self.mode == "sync":
            self.sync_levels = rng.choice((None, 1))
        self.own_buffers_written = (
            self.what == "ensemble"
            and not self.hand_made
            and self.mode == "sync"
            and rng.random() < 0.5
        )
        few = sorted(names, key=lambda n: own[n].numel())[:3]
        self.few = rng.choice([n for n in few if own[n].numel() <= 16] or few[:1])
        self.inside = rng.random() < 0.5
        self.by_input = not self.words and rng.random() < 0.4

        if self.what in QUANTITIES:
            self._draw_quantities()

    def _draw_quantities(self) -> None:
        """Some, with what they are given, and another batch to pair with."""
        rng = self.rng
        size = rng.choice((0, 1, 1, 2, 3, 5, 6))
        heads = (size, *self.y.shape[1 : self.y.dim() - (self.y.dtype != torch.long)])
        shape = (*heads, *self.shape)
        like = torch.randint if self.words else torch.randn
        first = (self.words, shape) if self.words else (shape,)
        x, another = (like(*first) for _ in range(2))
        y = torch.randint(OUTS, heads) if self.y.dtype == torch.long else None
        y = torch.randn(*heads, OUTS) if y is None else y
        scale = torch.rand(heads) + 0.5
        parts = [laid_out(_cast(t, self.dtype), rng)[0] for t in (x, y, scale, another)]
        self.other = parts
        makers = self._makers()
        count = rng.choice((1, 1, 2, 3, 5))
        chosen = rng.choices(list(makers), k=count)
        self.wanted = {f"{i} {n}": makers[n]() for i, n in enumerate(chosen)}
        self.alone = count == 1 and rng.random() < 0.7

    def _makers(self) -> dict[str, Callable[[], q.Quantity[Any]]]:
        rng, dtype = self.rng, self.dtype
        values = {n: self.values[n] for n in self.names}
        weights = torch.randn(self.size).to(rng.choice((dtype, torch.float64)))
        if self.size:
            weights[rng.randrange(self.size)] = 0
        functions = (_automatic, _at_most_one, torch.ones_like)
        most = rng.choice((0.01, 0.3, 3.0, 1e9))
        groups = {rng.choice(self.names): most, "*": rng.choice((0.1, 2.0))}
        if len(self.names) == 1:
            groups = {"*": most}
        many = rng.choice(((), (), (1,), (3,), (5,)))
        vectors = {
            n: torch.randn((*many, *v.shape)).to(dtype) for n, v in values.items()
        }
        k, kind = rng.choice((3, 70)), rng.choice(KINDS)
        found: dict[str, Callable[[], q.Quantity[Any]]] = {
            "losses": q.Losses,
            "norms": lambda: q.Norms(per_parameter=rng.random() < 0.5),
            "sum": q.Sum,
            "squares": q.SumOfSquares,
            "clipped": lambda: q.ClippedSum(most),
            "groups": lambda: q.ClippedSum(groups),
            "weighted": lambda: q.WeightedSum(weights),
            "automatic": lambda: q.WeightedSum(rng.choice(functions)),
            "dots": lambda: q.Dots(vectors),
            "sketch": lambda: q.Sketch(k, kind, rng.randrange(9)),
            "rows": q.Rows,
            "cosine": Cosine,
        }
        if self.chunk_size != "auto":
            found["gram"] = q.Gram
            if not self.dropout:
                x, y, scale, another = self.other
                other = self.batch_of(x, y, scale, another)
                found["gram with another"] = lambda: q.Gram(other=other)
        return found

    def _another_state(self) -> Values:
        """A state dict of other numbers; what is tied stays so."""
        net, made = self.net, {}
        named: list[tuple[str, Tensor]] = []
        named += net.named_parameters(remove_duplicate=False)
        named += net.named_buffers(remove_duplicate=False)
        for _, t in named:
            if id(t) not in made:
                by = 0.2 * torch.rand_like(t) + 1 if t.is_floating_point() else 1
                made[id(t)] = (t.detach() * by).to(t.dtype)
        found = {n: made[id(t)] for n, t in named}
        return {n: found[n] for n in net.state_dict()}

    def describe(self) -> str:
        left = {
            name: value
            for name, value in vars(self).items()
            if name
            not in (
                "rng",
                "net",
                "x",
                "y",
                "scale",
                "another",
                "values",
                "state",
                "buffers",
                "other",
            )
        }
        shapes = f"x {tuple(self.x.shape)} strides {self.x.stride()}"
        frozen = [n for n, p in self.net.named_parameters() if not p.requires_grad]
        flags = [n for n, m in self.net.named_modules() if not m.training]
        lines = [f"{name} = {value!r}" for name, value in left.items()]
        lines += [f"frozen {frozen}", f"not training {flags}", shapes]
        lines += [
            f"    {name}: {m}"
            for name, m in self.net.named_modules(remove_duplicate=False)
            if not any(m.children())
        ]
        return "\n".join(lines)

    # -- What both sides use -----------------------------------------------------------

    def groups_of(self, channels: int) -> int:
        """Of batch norm's channels in "group_norm"."""
        groups = self.num_groups
        if callable(groups):
            groups = groups(channels)
        return groups if channels % groups == 0 else channels

    def base_loss(self, out: Tensor, y: Tensor) -> Tensor:
        if self.loss == "cross entropy":
            return F.cross_entropy(out, y)
        if self.loss == "none":
            return F.cross_entropy(out, y, reduction="none")
        if self.loss == "squares":
            return (out - y).square().sum()
        return (out.sin() * y).sum() + out.square().mean()

    def block(self) -> Block[nn.Module]:
        return vmap_safe(
            self.net,
            mode=self.mode,
            num_groups=self.num_groups,
            update_running_stats=self.updates or self.own_buffers_written,
            sync_levels=self.sync_levels,
            fast=self.fast,
        )

    # -- The library -------------------------------------------------------------------

    def short_form(self) -> tuple[object, Any]:
        """(what was asked, aux) of one of the four functions."""
        net = self.net
        heat = torch.tensor(0.7, dtype=self.dtype, requires_grad=True)

        def loss_fn(out: Any, y: Tensor, *more: Tensor) -> Any:
            masks = ()
            if self.dropout:
                out, masks = out
            value = self.base_loss(out, y)
            if self.factor != 1:
                value = value * self.factor
            if self.heated:
                value = value * heat
            if self.regularised:
                value = value + 0.1 * total_of(
                    p.square().sum() for p in net.parameters()
                )
            if self.twice:
                value = value + (out * net(more[0])).sum()
            return (value, (out.detach(), masks)) if self.has_aux else value

        x = self.x
        if self.watched:
            x = x.detach().requires_grad_()
        batch = self.batch_of(x, self.y, self.scale, self.another)
        options: dict[str, Any] = {
            "mode": self.mode,
            "rows": self.rows,
            "chunk_size": self.chunk_size,
            "randomness": self.randomness,
            "has_aux": self.has_aux,
            "num_groups": self.num_groups,
            "update_running_stats": self.updates,
            "fast": self.fast,
        }
        if self.given == "names":
            options["params"] = self.names
        if self.given == "dict":
            options["params"] = {n: self.values[n] for n in self.names}
        if self.given == "state":
            options["params"] = self.state
        function: Callable[..., Any]
        if self.what == "rows":
            function = vmapsafe.per_sample_grads
            if self.out:
                options["out"] = {
                    n: torch.full((self.size, *self.values[n].shape), 7.0).to(
                        self.dtype
                    )
                    for n in self.names
                }
        elif self.what == "norms":
            function = vmapsafe.per_sample_grad_norms
            options["per_parameter"] = self.per_parameter
        elif self.what == "clipped":
            function = vmapsafe.clipped_grad_sum
            options["max_grad_norm"] = self.max_grad_norm * self.factor
        elif self.what in QUANTITIES:
            function = vmapsafe.per_sample
            wanted = self.wanted
            options["want"] = next(iter(wanted.values())) if self.alone else wanted
            options["keep_batch_dim"] = self.what in OF_ONE
        else:
            function = vmapsafe.per_sample_sketch
            options.update(k=self.k, kind=self.kind, seed=self.seed)
        found = function(net, loss_fn, *batch, **options)
        found, aux = found if self.has_aux else (found, None)
        if self.what in QUANTITIES and self.alone:
            found = dict.fromkeys(self.wanted, found)
        return found, aux

    def batch_of(
        self, x: Tensor, y: Tensor, scale: Tensor, another: Tensor
    ) -> tuple[Any, ...]:
        """What a call gets of these."""
        inputs: Any = {"x": x, "tuple": (x, scale), "dict": None}[self.inputs]
        if self.inputs == "dict":
            inputs = {"scale": scale, "x": x}
        return (inputs, y, *([another] if self.twice else []))

    def mapped(
        self,
        function: Callable[..., Any],
        chunked: bool = False,
        out_dims: int = 0,
        shared: int = 0,
    ) -> Callable[..., Any]:
        """``vmap`` over the slices, which lie along ``in_dim``; the last ``shared``
        arguments have none."""
        options: dict[str, Any] = {"randomness": self.randomness}
        if chunked:
            options["chunk_size"] = self.chunk_size
        in_dim = self.in_dim

        def over(x: Tensor, *rest: Tensor) -> Any:
            dims = (in_dim, *[0] * (len(rest) - shared), *[None] * shared)
            x = x.movedim(0, in_dim)
            return vmap(function, dims, out_dims, **options)(x, *rest)

        return over

    @property
    def by_graph(self) -> bool:
        """Whether plain autograd is to follow what is done."""
        return self.what in ("backward", "backward of rows", "rows pulled back")

    def call(self, values: Values, x: Tensor) -> Any:
        return functional_call(self.net, values, (x,))

    def loss_at(self, values: Values, x: Tensor, y: Tensor) -> Tensor:
        return self.base_loss(self.call(values, x), y)

    @property
    def own(self) -> Values:
        return {n: self.values[n] for n in self.names}

    def by_few(
        self, function: Callable[..., Tensor]
    ) -> tuple[Callable[..., Tensor], Tensor]:
        """``function`` of values, as one of a single parameter, and that."""
        return lambda w, *args: function({self.few: w}, *args), self.values[self.few]

    def all_out(self, values: Values) -> Tensor:
        return self.mapped(lambda x: self.call(values, x))(self.x)

    def summed(self, values: Values, x: Tensor) -> Tensor:
        out = self.mapped(lambda x: self.call(values, x))(x)
        return (out.tanh() * self.weigh(out)).sum()

    def along(self, function: Callable[[Values], Tensor]) -> Tensor:
        own = self.own
        tangents = {n: torch.cos(p + 1) for n, p in own.items()}
        return jvp(function, (own,), (tangents,))[1]

    def do_vmap(self) -> object:
        found = self.mapped(self.net, chunked=True, out_dims=self.out_dim)(self.x)
        if self.dropout:
            out, masks = found
            back = [m.movedim(self.out_dim, 0) for m in masks]
            return out.movedim(self.out_dim, 0), back
        return found.movedim(self.out_dim, 0)

    def do_vmap_of_vmap(self) -> object:
        return vmap(vmap(self.net))(self.x)

    def do_vmap_of_grad(self) -> object:
        argnums = (0, 1) if self.by_input else 0

        def loss_and_masks(
            values: Values, x: Tensor, y: Tensor
        ) -> tuple[Tensor, tuple[Tensor, object]]:
            out, masks = self.call(values, x)
            return self.base_loss(out, y), (out.detach(), masks)

        if self.dropout:
            derive = grad(loss_and_masks, argnums, has_aux=True)
        else:
            derive = grad(self.loss_at, argnums)
        one = functools.partial(derive, self.own)
        return self.mapped(one, chunked=True)(self.x, self.y)

    def do_vmap_of_jvp(self) -> object:
        if self.words:
            f, few = self.by_few(self.call)

            def by_weight(x: Tensor) -> Tensor:
                return jvp(lambda w: f(w, x), (few,), (torch.ones_like(few),))[1]

            return self.mapped(by_weight)(self.x)

        def by_input(x: Tensor, v: Tensor) -> Tensor:
            return jvp(lambda x: self.call(self.own, x), (x,), (v,))[1]

        # torch has no tangent for an expanded tensor.
        x = self.x.clone(memory_format=torch.contiguous_format)
        return self.mapped(by_input)(x, self.tangent(x))

    def do_vmap_of_jacrev(self) -> object:
        f, few = self.by_few(self.call)
        return self.mapped(lambda x: jacrev(f)(few, x))(self.x)

    def do_vmap_of_hessian(self) -> object:
        f, few = self.by_few(self.loss_at)
        return self.mapped(lambda x, y: hessian(f)(few, x, y))(self.x, self.y)

    def do_grad_of_vmap(self) -> object:
        return grad(self.summed, (0, 1) if self.by_input else 0)(self.own, self.x)

    def do_jvp_of_vmap(self) -> object:
        return self.along(self.all_out)

    def do_jacrev_of_vmap(self) -> object:
        f, few = self.by_few(self.all_out)
        return jacrev(f)(few)

    def do_jacfwd_of_vmap(self) -> object:
        f, few = self.by_few(self.all_out)
        return jacfwd(f)(few)

    def do_hessian_of_vmap(self) -> object:
        f, few = self.by_few(self.summed)
        return hessian(f)(few, self.x)

    def do_grad(self) -> object:
        return grad(self.loss_at)(self.own, self.x[0], self.y[0])

    def do_jvp(self) -> object:
        return self.along(lambda values: self.call(values, self.x[0]))

    def do_jacrev(self) -> object:
        f, few = self.by_few(self.call)
        return jacrev(f)(few, self.x[0])

    def do_jacfwd(self) -> object:
        f, few = self.by_few(self.call)
        return jacfwd(f)(few, self.x[0])

    def do_hessian(self) -> object:
        f, few = self.by_few(self.loss_at)
        return hessian(f)(few, self.x[0], self.y[0])

    def do_batched(self) -> object:
        assert not isinstance(self.chunk_size, str)
        run = batched(self.net, out_dims=self.out_dim, chunk_size=self.chunk_size)
        return run(self.x).movedim(self.out_dim, 0)

    def do_batched_grad(self) -> object:
        def loss(values: Values, x: Tensor, y: Tensor) -> Tensor:
            return self.loss_at(values, x[None], y[None])

        assert not isinstance(self.chunk_size, str)
        f = batched(
            grad(loss),
            in_dims=(None, 0, 0),
            keep_batch_dim=False,
            chunk_size=self.chunk_size,
        )
        return f(self.own, self.x, self.y)

    def rows_at(
        self, values: Values, chunk_size: ChunkSize = None, x: Tensor | None = None
    ) -> Values:
        return vmapsafe.per_sample_grads(
            self.net,
            self.base_loss,
            self.x if x is None else x,
            self.y,
            mode=self.mode,
            num_groups=self.num_groups,
            params=values,
            chunk_size=chunk_size,
            fast=self.fast,
        )

    def do_grad_of_rows(self) -> object:
        x, y = self.x[:, None], self.y[:, None]

        def penalty(values: Values) -> Tensor:
            if self.inside:
                rows = self.rows_at(values)
            else:
                rows = vmap(grad(self.loss_at), (None, 0, 0))(values, x, y)
            return total_of(r.square().sum() for r in rows.values())

        return grad(penalty)(self.own)

    def rows_of_few(self) -> tuple[Callable[[Tensor], Tensor], Tensor]:
        f, few = self.by_few(self.loss_at)
        rows = self.mapped(lambda x, y, w: grad(f)(w, x, y), shared=1)
        return lambda w: rows(self.x, self.y, w), few

    def do_jacrev_of_rows(self) -> object:
        rows, few = self.rows_of_few()
        return jacrev(rows)(few)

    def do_jacfwd_of_rows(self) -> object:
        rows, few = self.rows_of_few()
        return jacfwd(rows)(few)

    def do_rows_pulled_back(self) -> object:
        """The Jacobian again, from all unit vectors at once, at another level."""
        rows, few = self.rows_of_few()
        shape = self.size, *few.shape
        n = torch.Size(shape).numel()
        basis = torch.eye(n, dtype=self.dtype).reshape(n, *shape)
        if self.inside:
            pull = vjp(rows, few)[1]
            (found,) = vmap(vmap(pull))(basis.unsqueeze(0))
            return found.reshape(*shape, *few.shape)
        few = few.clone().requires_grad_()
        found = torch.zeros(n, *few.shape, dtype=self.dtype)
        out = rows(few)
        if out.requires_grad:
            (found,) = torch.autograd.grad(out, few, basis, is_grads_batched=True)
        return found.reshape(*shape, *few.shape)

    def do_backward_of_rows(self) -> object:
        leaves = {n: v.clone().requires_grad_() for n, v in self.own.items()}
        x = self.x.detach()
        if self.by_input:
            leaves["the input"] = x.requires_grad_()
        rows = self.rows_at({n: leaves[n] for n in self.own}, self.chunk_size, x)
        total = total_of(r.square().sum() for r in rows.values())
        found = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
        return _by_name(leaves, leaves.values(), found)

    def member(self, params: Values, buffers: Values, x: Tensor) -> Tensor:
        return functional_call(self.net, (params, buffers), (x,))

    def do_ensemble(self) -> object:
        params, buffers = stack_module_state(self.members())
        self.buffers = buffers
        params = {n: p.detach() for n, p in params.items()}
        if self.inside:
            return vmap(self.member, (0, 0, None))(params, buffers, self.x[0])
        first = self.x[0]
        x = torch.stack([first, first if self.words else first * 2])
        return vmap(self.member)(params, buffers, x)

    def do_ensemble_of_slices(self) -> object:
        params, buffers = stack_module_state(self.members())
        params = {n: p.detach() for n, p in params.items()}
        inner = vmap(self.member, (None, None, 0))
        return vmap(inner, (0, 0, None))(params, buffers, self.x)

    def do_ensemble_of_grad(self) -> object:
        params, buffers = stack_module_state(self.members())
        params = {n: p.detach() for n, p in params.items()}

        def loss(params: Values, buffers: Values, x: Tensor, y: Tensor) -> Tensor:
            return self.base_loss(self.member(params, buffers, x), y)

        derive = vmap(grad(loss), (0, 0, None, None))
        return derive(params, buffers, self.x[0], self.y[0])

    def twice_along(self, values: Values) -> Tensor:
        tangents = {n: torch.cos(p + 1).detach() for n, p in self.own.items()}
        return jvp(self.all_out, (values,), (tangents,))[1]

    def do_jvp_of_jvp(self) -> object:
        return self.along(self.twice_along)

    def do_grad_of_jvp(self) -> object:
        def weighed(values: Values) -> Tensor:
            out = self.twice_along(values)
            return (out.tanh() * self.weigh(out)).sum()

        return grad(weighed)(self.own)

    def do_grad_of_adapted(self) -> object:
        """MAML: a step on each task, and the gradient through it."""

        def task(values: Values, x: Tensor, y: Tensor) -> Tensor:
            first = grad(self.loss_at)(values, x, y)
            return self.loss_at(
                {n: v - 0.1 * first[n] for n, v in values.items()}, x, y
            )

        def loss(values: Values) -> Tensor:
            return self.mapped(functools.partial(task, values))(self.x, self.y).sum()

        return grad(loss)(self.own)

    def converted(self) -> Tensor:
        groups = {"num_groups": self.num_groups} if self.mode == "group_norm" else {}
        return vmapsafe.convert(self.net, mode=self.mode, **groups)(self.x[0])

    def backward(self) -> Values:
        """Plain autograd, in the block or after it."""
        params = dict(self.net.named_parameters())
        wanted = [n for n in self.names if params[n].requires_grad]
        if not wanted:
            wanted = [n for n, p in params.items() if p.requires_grad]
        leaves = [params[n] for n in wanted]
        with self.block():
            loss = self.base_loss(self.net(self.x[0]), self.y[0])
            if self.inside:
                found = torch.autograd.grad(loss, leaves, allow_unused=True)
        if not self.inside:
            found = torch.autograd.grad(loss, leaves, allow_unused=True)
        return _by_name(wanted, leaves, found)

    def members(self) -> list[nn.Module]:
        """Two networks of an ensemble, the case's own first."""
        torch.manual_seed(self.seed)
        second = copy.deepcopy(self.net)
        tuned(second, self.rng)
        return [self.net, second]

    def tangent(self, x: Tensor) -> Tensor:
        return torch.cos(3 * x) if x.is_floating_point() else x

    def weigh(self, out: Tensor) -> Tensor:
        """Numbers for each entry of ``out``, none of them special."""
        n = out.numel()
        return torch.linspace(0.3, 1.7, n, dtype=out.dtype).reshape(out.shape)

    def library(self) -> tuple[object, Any]:
        """(what was asked, aux)."""
        with contextlib.ExitStack() as stack:
            if self.autocast:
                stack.enter_context(torch.autocast("cpu", torch.bfloat16))
            if self.around == "no_grad" and not self.by_graph:
                stack.enter_context(torch.no_grad())
            if self.around == "another block":
                other = MODES[MODES.index(self.mode) - 1]
                stack.enter_context(vmap_safe(self.net, mode=other))
            if self.regimes:
                stack.enter_context(everywhere(self.regimes))
            return self._library()

    def _library(self) -> tuple[object, Any]:
        if self.what in SHORT:
            return self.short_form()
        if self.what == "converted":
            return self.converted(), None
        if self.what == "backward":
            return self.backward(), None
        run = getattr(self, "do_" + self.what.replace(" ", "_"))
        if self.by_decorator:
            found = self.block()(run)()
        else:
            with self.block():
                found = run()
        if not self.dropout:
            return found, None
        return (found[0], found) if self.what == "vmap" else found


@contextlib.contextmanager
def everywhere(algorithm: str) -> Iterator[None]:
    """No call too small for an algorithm that wins for large ones; or the regimes of a
    GPU, with small pieces."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        if algorithm == "gpu":
            take_regimes_of_a_gpu(monkeypatch)
            change_regimes(monkeypatch, formulas={"piece": 16})
        else:
            take_every_size(monkeypatch, algorithm, columns=8)
        yield


def _cast(t: Tensor, dtype: torch.dtype) -> Tensor:
    return t.to(dtype) if t.is_floating_point() else t


def _automatic(norms: Tensor) -> Tensor:
    return 1 / (norms + 0.1)


def _at_most_one(norms: Tensor) -> Tensor:
    return norms.clamp(max=1)


def _one_each(channels: int) -> int:
    return channels


def _halves(channels: int) -> int:
    return max(1, channels // 2)


def _by_name(
    names: Iterable[str], leaves: Iterable[Tensor], found: Iterable[Tensor | None]
) -> Values:
    return {
        n: torch.zeros_like(p) if g is None else g
        for n, p, g in zip(names, leaves, found)
    }
