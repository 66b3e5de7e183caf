"""Random programs around blocks, and what the owner of the models asked for.

A seed makes a program: blocks are entered and left in all ways, models are run, copied,
written and switched, errors fly. Beside each model stands a plain twin that no block
ever sees. What the owner does, outside forwards, is done to both; a forward of the
model is compared with one of the twin, written out in plain operations. So the twin is
at all times what the model has to be.

    python tests/support/state_programs.py --seed 17        run one again, print it
    python tests/support/state_programs.py --programs 2000  run many, print failures
"""

import argparse
import asyncio
import contextlib
import copy
import dataclasses
import functools
import gc
import inspect
import io
import pickle
import random
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from typing import Any, ParamSpec, Self, TypeVar

import torch
import torch.nn.functional as F
from plain import ModeName
from torch import Tensor, nn
from torch.func import functional_call, grad, stack_module_state, vmap
from torch.nn.modules import module as torch_module
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.overrides import _pop_mode
from torch.utils.checkpoint import checkpoint

from vmapsafe import (
    BlockError,
    NeverUpdatedWarning,
    clipped_grad_sum,
    per_sample_grad_norms,
    per_sample_grads,
    per_sample_sketch,
    vmap_safe,
)
from vmapsafe._block.vmap_safe import Block

C, L = 4, 3  # channels and length of all inputs, (N, C, L)


P = ParamSpec("P")
R = TypeVar("R")
Options = dict[str, Any]


class Mismatch(AssertionError):
    """The model is not what its owner asked for."""


class Planned(Exception):
    """An error of the program's own."""


ERRORS = (
    Planned,
    KeyboardInterrupt,
    SystemExit,
    asyncio.CancelledError,
    GeneratorExit,
)

# -- Models ----------------------------------------------------------------------------


class HandMadeStats(nn.Module):
    """Batch norm by hand, in place."""

    running_mean: Tensor
    running_var: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(C))
        self.register_buffer("running_var", torch.ones(C))

    def forward(self, x: Tensor) -> Tensor:
        mean, var = self.running_mean, self.running_var
        if self.training:
            mean, var = x.mean((0, 2)), x.var((0, 2), unbiased=False)
            with torch.no_grad():
                self.running_mean.lerp_(mean, 0.1)
                self.running_var.lerp_(var, 0.1)
        return (x - mean[:, None]) / (var[:, None] + 1e-3).sqrt()


class HandMadeMean(nn.Module):
    """A running mean under another name, in place."""

    mu: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mu", torch.zeros(C))

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x - self.mu[:, None]
        mean = x.mean((0, 2))
        self.mu.mul_(0.9).add_(mean.detach(), alpha=0.1)
        return x - mean[:, None]


class Assigned(nn.Module):
    """A running mean that is assigned."""

    mu: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mu", torch.zeros(C))

    def forward(self, x: Tensor) -> Tensor:
        out = x - self.mu[:, None]
        if self.training:
            self.mu = 0.9 * self.mu + 0.1 * x.detach().mean((0, 2))
        return out


class Counts(nn.Module):
    """Counts its calls, in three spellings, in whole numbers."""

    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(3, dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1)
        self.calls[0] = 7
        torch.add(self.calls, 2, out=self.calls)
        return x


class Scaled(nn.Module):
    """No normalisation, but another thing in training."""

    def forward(self, x: Tensor) -> Tensor:
        return x * (1.5 if self.training else 0.5)


class Act(nn.BatchNorm1d):
    """Batch norm that reaches F.batch_norm by itself, with an activation after it."""

    def forward(self, x: Tensor) -> Tensor:
        training = self.training or self.running_mean is None
        if self.training and self.num_batches_tracked is not None:
            if self.track_running_stats:
                self.num_batches_tracked.add_(1)
        tracked = not self.training or self.track_running_stats
        return torch.tanh(
            F.batch_norm(
                x,
                self.running_mean if tracked else None,
                self.running_var if tracked else None,
                self.weight,
                self.bias,
                training,
                self.momentum or 0.0,
                self.eps,
            )
        )


class Residual(nn.Module):
    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class Fuse(nn.Module):
    """Raises what was planned, in forward or in backward."""

    forward_raises: BaseException | None = None
    backward_raises: BaseException | None = None

    def forward(self, x: Tensor) -> Tensor:
        if Fuse.forward_raises is not None:
            error, Fuse.forward_raises = Fuse.forward_raises, None
            raise error
        if Fuse.backward_raises is not None and x.requires_grad:
            error, Fuse.backward_raises = Fuse.backward_raises, None

            def burn(grad: Tensor) -> None:
                raise error

            x = x * 1
            x.register_hook(burn)
        return x


HAND_MADE = (HandMadeStats, HandMadeMean, Assigned, Counts)
LEAVES: list[Callable[[], nn.Module]] = [
    lambda: nn.BatchNorm1d(C),
    lambda: nn.BatchNorm1d(C, affine=False),
    lambda: nn.BatchNorm1d(C, momentum=None),
    lambda: nn.BatchNorm1d(C, track_running_stats=False),
    lambda: nn.SyncBatchNorm(C),
    lambda: Act(C),
    lambda: nn.InstanceNorm1d(C, affine=True, track_running_stats=True),
    lambda: nn.InstanceNorm1d(C),
    lambda: nn.Conv1d(C, C, 1),
    Scaled,
    HandMadeStats,
    HandMadeMean,
    Assigned,
    Counts,
]


def built(rng: random.Random, hand_made: bool) -> nn.Sequential:
    def leaf() -> nn.Module:
        while True:
            made = rng.choice(LEAVES)()
            if hand_made or not isinstance(made, HAND_MADE):
                return made

    def part() -> nn.Module:
        return nn.Sequential(*[leaf() for _ in range(rng.randint(1, 3))])

    parts: list[nn.Module] = [nn.Conv1d(C, C, 1), nn.BatchNorm1d(C)]
    kinds: list[Callable[[], nn.Module]] = [leaf, part, lambda: Residual(part())]
    for _ in range(rng.randint(1, 3)):
        parts.append(rng.choice(kinds)())
    if rng.random() < 0.2:  # one layer, used twice
        parts.append(parts[1])
    parts.insert(rng.randint(1, len(parts)), Fuse())
    model = nn.Sequential(*parts).double()
    for _ in range(2):
        model(torch.randn(4, C, L, dtype=torch.float64) * 2 + 1)
    if rng.random() < 0.2:
        model.eval()
    for module in model.modules():
        if module is not model and rng.random() < 0.15:
            module.train(not module.training)
    return model


def is_norm(module: nn.Module) -> bool:
    """Whether blocks say what its flags are."""
    if isinstance(module, (_BatchNorm, HandMadeStats)):
        return True
    return isinstance(module, _NormBase) and module.running_mean is not None


# -- The meaning, in plain operations --------------------------------------------------


def reference(module: nn.Module, x: Tensor, how: "How") -> Tensor:
    """``module`` on slices ``x`` (B, N, C, L); ``how(layer)`` is the innermost block
    that covers it, a :class:`Cover`, or None. A layer that nothing covers runs, and
    writes, as it is."""
    if isinstance(module, nn.Sequential):
        for child in module:
            x = reference(child, x, how)
        return x
    if isinstance(module, Residual):
        return x + reference(module.body, x, how)
    cover = how(module)
    if cover is None or not module._buffers:
        return module(x.flatten(0, 1)).unflatten(0, x.shape[:2])
    if isinstance(module, _NormBase):
        return _normalised(module, x, cover)
    if isinstance(module, HandMadeStats):
        mean, var = module.running_mean, module.running_var
        if module.training and cover.mode != "eval":
            mean, var = _statistics(x, (1, 3))
            mean, var = mean.squeeze(-1), var.squeeze(-1)
        return (x - mean[..., None]) / (var[..., None] + 1e-3).sqrt()
    if isinstance(module, HandMadeMean) and module.training:
        return x - x.mean((1, 3), keepdim=True)
    if isinstance(module, Counts):
        return x
    assert isinstance(module, (HandMadeMean, Assigned))
    return x - module.mu[:, None]


def _statistics(x: Tensor, dims: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    mean = x.mean(dims, keepdim=True)
    return mean, (x - mean).square().mean(dims, keepdim=True)


def _normalised(layer: _NormBase, x: Tensor, cover: "Cover") -> Tensor:
    batch_norm, mode = isinstance(layer, _BatchNorm), cover.mode
    if layer in cover.frozen and not (mode == "sync" and layer.running_mean is None):
        mode = "eval"  # without running statistics it uses the batch's then too
    elif not batch_norm and layer.running_mean is None:
        mode = "no_running_stats"
    elif not batch_norm and mode == "group_norm":
        mode = "no_running_stats" if layer.training else "eval"
    if mode == "sync" and cover.updates and layer.running_mean is not None:
        training, layer.training = layer.training, True
        with torch.no_grad():
            layer(x.flatten(0, 1))
        layer.training = training
    mean, var = layer.running_mean, layer.running_var
    if mode == "eval" and mean is not None and var is not None:
        mean, var = mean[:, None], var[:, None]
    elif not batch_norm:
        mean, var = _statistics(x, (3,))
    elif mode == "group_norm":
        groups = cover.options["num_groups"]
        grouped = x.unflatten(2, (groups, -1))
        mean, var = _statistics(grouped, (3, 4))
        mean, var = [t.expand_as(grouped[..., :1]).flatten(2, 3) for t in (mean, var)]
    else:
        mean, var = _statistics(x, (0, 1, 3) if mode == "sync" else (1, 3))
    x = (x - mean) / (var + layer.eps).sqrt()
    if layer.weight is not None and layer.bias is not None:
        x = x * layer.weight[:, None] + layer.bias[:, None]
    return torch.tanh(x) if isinstance(layer, Act) else x


@dataclasses.dataclass(eq=False)
class Cover:
    """One open block, for one of its models.

    Attributes:
        options: those of the block.
        modules: of the twin.
        frozen: those of its layers that their owner had frozen at entry.
        unclear: what its layers compute is not said any more.
        touched: whether the owner spoke since entry.
        replaced: whether the model has a layer now that it had not.
    """

    options: Options
    root: nn.Module
    modules: set[nn.Module]
    frozen: set[nn.Module]
    unclear: bool = False
    touched: bool = False
    replaced: bool = False

    @property
    def mode(self) -> ModeName:
        return self.options.get("mode", "eval")

    @property
    def updates(self) -> bool:
        return self.options.get("update_running_stats", False)


# The innermost block that covers a layer.
How = Callable[[nn.Module], Cover | None]

# -- A model, its twin, and what may be between them -----------------------------------


class Owned:
    """A model, and its twin.

    Attributes:
        said: for a layer of the twin whose owner's last word a block cannot know, the
            flags it may have when the last block is left.
    """

    def __init__(self, name: str, model: nn.Module) -> None:
        self.name, self.model, self.twin = name, model, copy.deepcopy(model)
        self.removed: list[tuple[nn.Module, nn.Module]] = []
        self.said: dict[nn.Module, set[bool]] = {}
        self.graphs: list[tuple[Tensor, Tensor]] = []
        self.remember()

    def pairs(self) -> list[tuple[str, nn.Module, nn.Module]]:
        """(path, module, twin), those taken out of the model too."""
        found = {}
        for (name, module), twin in zip(
            self.model.named_modules(), self.twin.modules()
        ):
            found[module] = (name, module, twin)
        for number, (module, twin) in enumerate(self.removed):
            for (name, a), b in zip(module.named_modules(), twin.modules()):
                found.setdefault(a, (f"removed {number}.{name}", a, b))
        return list(found.values())

    def twin_of(self, module: nn.Module) -> nn.Module:
        return {a: b for _, a, b in self.pairs()}[module]

    def remember(self) -> None:
        """Which tensors the model has now is its owner's doing."""
        self.tensors = {
            (a, name): tensor
            for _, a, _ in self.pairs()
            for name, tensor in [*a._parameters.items(), *a._buffers.items()]
        }

    @property
    def functional(self) -> bool:
        """Whether functional_call can be used: torch's own leaves other parameters
        behind where a module has two places in the model (2.13)."""
        names = [n for n, _ in self.model.named_modules(remove_duplicate=False)]
        return len(names) == len(list(self.model.modules()))

    @property
    def dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype

    def inputs(self, rng: random.Random, *sizes: int) -> Tensor:
        generator = torch.Generator().manual_seed(rng.randrange(1 << 30))
        x = torch.randn(*sizes, C, L, generator=generator, dtype=torch.float64)
        return (x * 1.5 + 0.5).to(self.dtype)

    def differences(self, covered: set[nn.Module], settled: bool) -> Iterator[str]:
        """Lines on what is not as the owner asked; flags of what is ``covered`` are not
        looked at, nor ``settled`` says whether the owner's word is known for all."""
        for name, a, b in self.pairs():
            for kind in ("_parameters", "_buffers"):
                mine, other = getattr(a, kind), getattr(b, kind)
                if list(mine) != list(other):
                    yield f"{name}.{kind}: {list(mine)}, not {list(other)}"
                    continue
                for key, tensor in mine.items():
                    label = f"{name}.{key}"
                    if tensor is not self.tensors.get((a, key)):
                        yield f"{label} is another tensor"
                    if tensor is None or other[key] is None:
                        if tensor is not other[key]:
                            yield f"{label}: {tensor}, not {other[key]}"
                        continue
                    if not same(tensor, other[key]):
                        yield f"{label} = {shown(tensor)}, not {shown(other[key])}"
                    if tensor.requires_grad != other[key].requires_grad:
                        yield f"{label}.requires_grad is {tensor.requires_grad}"
                    if not same(tensor.grad, other[key].grad):
                        yield f"{label}.grad is off"
            if b not in covered:
                allowed = self.said.get(b, {b.training})
                if a.training not in allowed:
                    yield f"{name}.training is {a.training}, its owner said {allowed}"
                if vars(a).get("track_running_stats") != vars(b).get(
                    "track_running_stats"
                ):
                    yield f"{name}.track_running_stats is {a.track_running_stats}"
            if settled and type(a) is not type(b):
                yield f"{name} is a {type(a)}"
            keys = set(vars(a)) ^ set(vars(b))
            if settled and keys:
                yield f"{name} has or lacks the attributes {sorted(keys)}"
            for key in vars(b):
                if not key.endswith("_hooks") and "_hooks_" not in key:
                    continue
                if settled and len(vars(a)[key]) != len(vars(b)[key]):
                    yield f"{name}.{key} has {len(vars(a)[key])} entries"
            for key in ("momentum", "eps", "note"):
                if getattr(a, key, None) != getattr(b, key, None):
                    yield f"{name}.{key} is {getattr(a, key, None)}"


def total_loss(out: Tensor) -> Tensor:
    """One that normalised values do not keep constant."""
    weights = torch.arange(C * L, dtype=out.dtype).cos().view(C, L)
    return (out * weights + out.sin()).sum()


@functools.cache
def scripted() -> nn.Module:
    return torch.jit.script(nn.Sequential(nn.BatchNorm1d(C)))


def same(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    tolerance = 1e-9 if a.dtype == torch.float64 else 2e-3
    return torch.allclose(a.detach(), b.detach(), tolerance, tolerance, equal_nan=True)


def shown(tensor: Tensor) -> str:
    return str(tensor.detach().flatten()[:2].tolist())


def plain(f: Callable[P, R]) -> Callable[P, R]:
    """``f`` past all modes: what the twin does is nobody's business."""

    def called(*args: P.args, **kwargs: P.kwargs) -> R:
        with torch._C.DisableTorchFunction():
            return f(*args, **kwargs)

    return called


# A model, and the path and the module of what a block covers of it.
Root = tuple[Owned, str, nn.Module]
# Runs what it is given, or what is drawn, inside a block.
Inside = Callable[..., object]

HAS_ALSO = "also" in inspect.signature(vmap_safe).parameters

# -- Programs --------------------------------------------------------------------------


class Program:
    """The program of one seed, made up as it runs."""

    def __init__(
        self, seed: int, echo: bool = False, without: Sequence[str] = ()
    ) -> None:
        self.rng = random.Random(seed)
        self.seed, self.echo, self.without = seed, echo, without
        self.lines: list[str] = []
        self.depth = self.nested = 0
        torch.manual_seed(seed)
        self.owned = [
            Owned(name, built(self.rng, self.rng.random() < 0.5))
            for name in ("a", "b")[: self.rng.choice([1, 1, 2])]
        ]
        self.covers: list[Cover] = []  # of this thread, innermost last
        self.planned: BaseException | None = None
        self.levels = 0
        self.shared = False  # with another thread
        self.optimizers = {
            one: [torch.optim.SGD(m.parameters(), 0.01) for m in (one.model, one.twin)]
            for one in self.owned
        }
        self.hooks = _global_hooks()

    def say(self, line: str) -> None:
        line = "    " * self.depth + line
        self.lines.append(line)
        if self.echo:
            print(line, flush=True)

    def run(self) -> None:
        for one in self.owned:
            self.say(f"{one.name} = {one.model}".replace("\n", "\n" + "    "))
            off = [n for n, m in one.model.named_modules() if not m.training]
            self.say(f"in eval mode: {off}")
        for _ in range(self.rng.randint(2, 4)):
            self.act()
        self.look()
        if torch._C._len_torch_function_stack():
            raise Mismatch("a torch function mode is left")
        for one in self.owned:
            one.graphs.clear()
        gc.collect()
        if _global_hooks() != self.hooks:
            raise Mismatch("hooks on all modules are left")

    # What is open ------------------------------------------------------------------

    def of(self, one: Owned) -> list[Cover]:
        twins = {b for _, _, b in one.pairs()}
        return [cover for cover in self.covers if cover.root in twins]

    def how(self, module: nn.Module) -> Cover | None:
        for cover in reversed(self.covers):
            if module in cover.modules:
                return cover
        return None

    def unclear(self, one: Owned) -> bool:
        return bool(one.said) or any(cover.unclear for cover in self.of(one))

    def whole(self, one: Owned) -> bool:
        """Whether blocks cover all of it."""
        return any(cover.root is one.twin for cover in self.of(one))

    def writes(self, one: Owned) -> bool:
        """Whether a forward may write: layers not covered, or asked to."""
        return not self.whole(one) or any(cover.updates for cover in self.of(one))

    def look(self) -> None:
        for one in self.owned:
            covers = self.of(one)
            covered = {m for c in covers for m in c.modules if is_norm(m)}
            found = list(one.differences(covered, not covers))
            if found:
                raise Mismatch(f"{one.name}: " + "; ".join(found[:4]))
            if not covers:  # now it is known
                for module, twin in [p[1:] for p in one.pairs()]:
                    if twin in one.said:
                        twin.training = module.training
                one.said.clear()

    # Steps -------------------------------------------------------------------------

    def body(self) -> None:
        for _ in range(self.rng.randint(1, 4)):
            self.act()

    def act(self) -> None:
        if self.depth < 3 and self.rng.random() < 0.3 and not self.shared:
            self.block()
        else:
            step = self.rng.choices(*zip(*STEPS))[0]
            one = self.rng.choice(self.owned)
            if not (step in FORWARDS and any(c.replaced for c in self.of(one))):
                if step not in self.without:
                    getattr(self, step)(one)
        self.look()

    def block(self) -> None:
        """One block, entered and left in one of many ways."""
        roots, options = self.drawn_block()
        if not roots:
            return
        way = self.rng.choice(WAYS)
        paths = [f"{one.name}[{name!r}]" for one, name, _ in roots]
        self.say(f"block, {way}: {', '.join(paths)}, {options}")
        modules = [module for _, _, module in roots]
        made = vmap_safe(*modules, **options)

        def inside(body: Callable[[], object] = self.body) -> object:
            covers = [self.cover(one, module, options) for one, _, module in roots]
            before = len(self.covers)
            self.covers.extend(covers)
            self.depth += 1
            try:
                return body()
            finally:
                self.depth -= 1
                del self.covers[before:]

        self.nested += 1
        self.roots = modules
        try:
            getattr(self, "way_" + way)(made, inside)
        except ERRORS as error:
            if error is not self.planned:
                raise
            self.levels -= 1
            if self.levels > 0:
                raise
            self.caught(error)
            self.say(f"caught {type(error).__name__}")
        finally:
            self.nested -= 1
        self.say("left")

    def drawn_block(self) -> tuple[list[Root], Options]:
        rng = self.rng
        mode = rng.choice(["eval", "eval", "no_running_stats", "group_norm", "sync"])
        options: Options = {"mode": mode}
        ones = rng.sample(self.owned, rng.randint(1, len(self.owned)))
        if any(one.said for one in ones):
            return [], {}
        if mode == "group_norm":
            options["num_groups"] = rng.choice([1, 2])
        hand_made = any(
            isinstance(m, HAND_MADE) for o in ones for m in o.twin.modules()
        )
        if mode == "sync" and not hand_made and rng.random() < 0.4:
            options["update_running_stats"] = True
        if mode == "sync" and rng.random() < 0.2:
            options["sync_levels"] = 1
        if rng.random() < 0.2:
            options["fast"] = False
        if HAS_ALSO and mode == "eval" and rng.random() < 0.2:
            options["also"] = (HandMadeStats,)
        roots: list[Root] = []
        for one in ones:
            name, module = "", one.model
            if rng.random() < 0.3:
                name, module = rng.choice(list(one.model.named_modules()))
            roots.append((one, name, module))
        return roots, options

    def cover(self, one: Owned, module: nn.Module, options: Options) -> Cover:
        root = one.twin_of(module)
        modules = set(root.modules())
        frozen = {m for m in modules if root.training and not m.training}
        cover = Cover(options, root, modules, frozen)
        if cover.mode != "eval":
            hand_made = [m for m in modules if isinstance(m, HandMadeStats)]
            cover.unclear = any(not m.training for m in hand_made)
        return cover

    # Ways to enter and leave -------------------------------------------------------

    def way_with(self, made: Block[Any], inside: Inside) -> None:
        with made:
            inside()

    def way_stack(self, made: Block[Any], inside: Inside) -> None:
        with contextlib.ExitStack() as stack:
            stack.enter_context(made)
            inside()

    def way_twice(self, made: Block[Any], inside: Inside) -> None:
        """One object, entered twice and again."""
        with made, made:
            inside()
        with made:
            inside()

    def way_decorated(self, made: Block[Any], inside: Inside) -> None:
        made(lambda: inside())()

    def way_recursion(self, made: Block[Any], inside: Inside) -> None:
        @made
        def f(times: int) -> object:
            return inside(lambda: f(times - 1)) if times else inside()

        f(2)

    def way_generator(self, made: Block[Any], inside: Inside) -> None:
        """A plain one: the block stays open while it waits."""

        def f() -> Generator[None, Callable[[], object], None]:
            with made:
                inside((yield))

        generator = f()
        next(generator)
        # Not covered by what happens below: the body runs in the generator.
        if self.rng.random() < 0.5:
            with contextlib.suppress(StopIteration):
                generator.send(self.body)
        elif self.rng.random() < 0.5:
            generator.close()
        else:
            del generator
            gc.collect()

    def way_resumed(self, made: Block[Any], inside: Inside) -> None:
        """A decorated one: the block is closed while it waits."""

        @made
        def f() -> Generator[None, None, None]:
            inside()
            yield
            inside()
            yield

        generator = f()
        next(generator)
        self.look()
        self.say("waiting")
        self.act()
        end = self.rng.choice(["next", "close", "throw"])
        self.say(end)
        if end == "next":
            list(generator)
        elif end == "close":
            generator.close()
        else:
            with contextlib.suppress(Planned):
                generator.throw(Planned())

    def way_twofold(self, made: Block[Any], inside: Inside) -> None:
        """A failing entry first: nothing of it is left."""
        for bad in (nn.Sequential(nn.LazyBatchNorm1d()), scripted()):
            try:
                vmap_safe(*self.roots, bad, mode="sync").__enter__()
            except (ValueError, TypeError):
                pass
            else:
                raise Mismatch("a block that cannot be opened was")
            self.look()

        class Fresh(nn.BatchNorm1d):  # anew: one warning a class and process
            pass

        with warnings.catch_warnings():
            warnings.simplefilter("error", NeverUpdatedWarning)
            try:
                vmap_safe(
                    *self.roots, type("Root", (nn.Sequential,), {})(Fresh(C))
                ).__enter__()
            except NeverUpdatedWarning:
                pass
            else:
                raise Mismatch("no warning of statistics that were never updated")
        self.look()
        with made:
            inside()

    def way_default_device(self, made: Block[Any], inside: Inside) -> None:
        """torch's own mode, set inside and left open."""
        try:
            with made:
                torch.set_default_device("cpu")
                inside()
        finally:
            torch.set_default_device(None)

    def way_wrong_order(self, made: Block[Any], inside: Inside) -> None:
        """An error, and nothing of either is left."""
        first = vmap_safe(*self.roots, mode="eval")
        outer, inner = self.rng.sample([first, made], 2)
        outer.__enter__()
        inner.__enter__()
        try:
            outer.__exit__(None, None, None)
        except BlockError:
            pass
        else:
            raise Mismatch("closed in the wrong order without an error")
        inner.__exit__(None, None, None)
        self.look()
        with contextlib.suppress(BlockError):
            outer.__exit__(None, None, None)

    def way_straggler(self, made: Block[Any], inside: Inside) -> None:
        """Another thread enters with the same options and leaves later."""
        if self.covers:
            return self.way_with(made, inside)
        entered, end = threading.Event(), threading.Event()

        def work() -> None:
            with made:
                entered.set()
                end.wait(30)

        with Thread(work) as thread:
            try:
                with made:
                    covers = []

                    def first() -> None:
                        covers.extend(self.covers)
                        thread.start()
                        if not entered.wait(30):
                            end.set()
                            thread.join()
                        self.shared = True
                        self.body()

                    try:
                        inside(first)
                    finally:
                        self.shared = False
                if not any(cover.touched for cover in covers):
                    for one in self.owned:
                        mine = [c for c in covers if c.root in set(one.twin.modules())]
                        if mine:
                            self.without_a_block(one, mine)
            finally:
                end.set()

    def way_finalised(self, made: Block[Any], inside: Inside) -> None:
        """The block object and the generator that opened it die by themselves."""

        def f() -> Iterator[None]:
            with made:
                yield

        ring: list[Any] = [f()]
        ring.append(ring)
        next(ring[0])
        del ring
        gc.collect()
        self.look()

    # The owner's words -------------------------------------------------------------

    def spoken(
        self, one: Owned, modules: Iterable[nn.Module], value: bool, certain: bool
    ) -> None:
        """Note what the owner said of ``modules`` of the model."""
        for cover in self.of(one):
            cover.touched = True
            kinds = {type(m) for m in cover.modules}
            if cover.mode != "eval" and HandMadeStats in kinds:
                cover.unclear = True
            if cover.mode == "group_norm" and nn.InstanceNorm1d in kinds:
                cover.unclear = True
        held = {m for c in self.of(one) for m in c.modules if is_norm(m)}
        for module in modules:
            twin = one.twin_of(module)
            if twin in held and not certain:
                one.said[twin] = one.said.get(twin, {twin.training}) | {value}
            else:
                one.said.pop(twin, None)

    def train(self, one: Owned) -> None:
        """train() or eval() on the model or on a part with parts."""
        value = self.rng.random() < 0.5
        parts = [
            (name, m)
            for name, m in one.model.named_modules()
            if isinstance(m, (nn.Sequential, Residual))
        ]
        name, module = parts[0] if self.rng.random() < 0.5 else self.rng.choice(parts)
        self.say(f"{one.name}[{name!r}].train({value})")
        twin = one.twin_of(module)
        self.spoken(one, list(module.modules()), value, True)
        if self.rng.random() < 0.5:
            module.train(value)
        else:
            module.train() if value else module.eval()
        twin.train(value)

    def train_layer(self, one: Owned) -> None:
        """train(), eval() or an assignment, on one module alone."""
        value = self.rng.random() < 0.5
        name, module = self.rng.choice(list(one.model.named_modules()))
        twin = one.twin_of(module)
        held = {m for c in self.of(one) for m in c.modules if is_norm(m)}
        leaf = not any(True for _ in module.children())
        self.say(f"{one.name}[{name!r}].training = {value}")
        # With the value that the block has set it cannot be seen.
        certain = leaf and not (twin in held and module.training == value)
        below = [m for m in module.modules() if one.twin_of(m) in held]
        self.spoken(one, {module, *below}, value, certain)
        if leaf and self.rng.random() < 0.5:
            module.train(value)
        else:
            module.training = value
        twin.training = value

    # Forwards ----------------------------------------------------------------------

    def settled(
        self,
        one: Owned,
        forward: Callable[[], Tensor],
        expected: Callable[[], Tensor],
        check: bool = True,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Run both; compare values, and what may not be written bit for bit."""
        before = None
        if not self.writes(one):
            before = {
                (name, key): (t, t._version, t.clone())
                for name, m, _ in one.pairs()
                for key, t in m._buffers.items()
                if t is not None
            }
        try:
            both = self.guarded(forward, expected)
        finally:
            self.assigned_by_forward(one)
        found, wanted = (None, None) if both is None else both
        if before is not None:
            now = {
                (name, key): t
                for name, m, _ in one.pairs()
                for key, t in m._buffers.items()
                if t is not None
            }
            for place, (tensor, version, value) in before.items():
                if now.get(place) is not tensor:
                    raise Mismatch(f"{place} was replaced by a forward")
                if tensor._version != version or not torch.equal(tensor, value):
                    raise Mismatch(f"{place} was written by a forward")
        if found is not None and wanted is not None and check and not self.unclear(one):
            if not same(found, wanted):
                off = (found - wanted).abs().max() / wanted.abs().max()
                raise Mismatch(
                    f"forward of {one.name}: {shown(found)}, not {shown(wanted)}, "
                    f"off by {off:.1e}"
                )
        return found, wanted

    def assigned_by_forward(self, one: Owned) -> None:
        """A forward that nothing covers may assign its buffers: its owner's wish."""
        for _, a, b in one.pairs():
            if isinstance(a, Assigned) and self.how(b) is None:
                one.tensors[a, "mu"] = a._buffers["mu"]

    def guarded(
        self, forward: Callable[[], R], expected: Callable[[], R]
    ) -> tuple[R, R] | None:
        """Both, or the error planned from both."""
        burning = Fuse.forward_raises, Fuse.backward_raises
        try:
            found = forward()
        except ERRORS as error:
            if error is not self.planned:
                raise
            Fuse.forward_raises, Fuse.backward_raises = burning
            try:
                plain(expected)()
            except ERRORS as other:
                if other is not error:
                    raise
            else:
                raise Mismatch("only the model raised")
            self.say(f"raised {type(error).__name__}")
            if self.levels > 0:
                raise
            self.caught(error)
            return None
        Fuse.forward_raises, Fuse.backward_raises = burning
        wanted = plain(expected)()
        Fuse.forward_raises = Fuse.backward_raises = None
        if self.planned is not None and self.planned.args == ("forward",):
            raise Mismatch("the planned error got lost")
        return found, wanted

    def caught(self, error: BaseException) -> None:
        """No graph stays alive, of which a hook knows the error."""
        self.planned = None
        error.__traceback__ = None

    def plan(self, where: str) -> BaseException:
        """An error that is to fly in the next step, and how far."""
        error = self.rng.choice(ERRORS)(where)
        self.planned = error
        self.levels = self.rng.randint(0, self.nested)
        self.say(f"plan {type(error).__name__} in {where}, {self.levels} blocks up")
        return error

    def sizes(self, one: Owned) -> tuple[int, int]:
        """Of slices; one slice where the model cannot be vmapped."""
        return (self.rng.randint(2, 3), self.rng.randint(2, 3))

    def forward(self, one: Owned) -> None:
        """The model on a batch or, where blocks cover it, on slices."""
        sliced = self.whole(one) and self.rng.random() < 0.6
        sizes = self.sizes(one)
        x = one.inputs(self.rng, *(sizes if sliced else (1, *sizes[1:])))
        how = self.rng.choice(["plain", "functional", "no_grad"])
        buffers = {}
        if how == "functional" and self.rng.random() < 0.6 and not self.writes(one):
            buffers = {k: v.clone() for k, v in one.model.named_buffers()}
        handed_in = {k: v.clone() for k, v in buffers.items()}
        if self.rng.random() < 0.25:
            Fuse.forward_raises = self.plan("forward")
        self.say(f"{how} forward of {one.name}{', vmapped' if sliced else ''}")

        def run(x: Tensor) -> Tensor:
            if how == "functional" and self.whole(one) and one.functional:
                params = dict(one.model.named_parameters())
                return functional_call(one.model, {**params, **buffers}, (x,))
            return one.model(x)

        def forward() -> Tensor:
            with torch.no_grad() if how == "no_grad" else contextlib.nullcontext():
                return vmap(run)(x) if sliced else run(x[0])[None]

        found, wanted = self.settled(
            one, forward, lambda: reference(one.twin, x, self.how)
        )
        for key, value in handed_in.items():
            if not torch.equal(buffers[key], value):
                raise Mismatch(f"{key}, handed in, was written")
        if found is None or wanted is None or how == "no_grad" or self.unclear(one):
            return
        if self.writes(one):
            one.graphs.clear()  # what they saved was written
        one.graphs.append((found, wanted))

    def backward(self, one: Owned) -> None:
        """Of a forward made in this block, in one that was left, or outside all."""
        if not one.graphs:
            return self.forward(one)
        found, wanted = one.graphs.pop(self.rng.randrange(len(one.graphs)))
        weights = torch.randn(found.shape, dtype=found.dtype)
        self.say(f"backward in {one.name}")
        (found * weights).sum().backward()
        plain(lambda: (wanted * weights).sum().backward())()

    def interrupted_backward(self, one: Owned) -> None:
        """An error in the middle of a backward."""
        if not self.whole(one) or self.unclear(one):
            return
        x = one.inputs(self.rng, 1, 3)
        self.say(f"interrupted backward in {one.name}")
        Fuse.backward_raises = self.plan("backward")

        def forward() -> None:
            total_loss(one.model(x[0])).backward()

        def expected() -> None:
            total_loss(reference(one.twin, x, self.how)).backward()

        try:
            self.guarded(forward, expected)
        finally:
            Fuse.backward_raises = None
            for model in (one.model, one.twin):
                model.zero_grad()
            if self.planned is not None and self.levels == 0:
                self.planned = None

    def rows(self, one: Owned) -> None:
        """The sum of the user's own vmap(grad) is the gradient of the sum."""
        if not self.whole(one) or not one.functional:
            return
        x = one.inputs(self.rng, 3, 2)
        names = [n for n, p in one.model.named_parameters() if p.requires_grad]
        if not names:
            return
        params = {n: one.model.get_parameter(n).detach() for n in names}
        self.say(f"vmap(grad) of {one.name}")

        def loss(params: dict[str, Tensor], x: Tensor) -> Tensor:
            return total_loss(functional_call(one.model, params, (x,)))

        def forward() -> Tensor:
            rows = vmap(grad(loss), (None, 0))(params, x)
            return torch.cat([rows[n].sum(0).flatten() for n in names])

        def expected() -> Tensor:
            total = total_loss(reference(one.twin, x, self.how))
            wanted = [one.twin.get_parameter(n) for n in names]
            grads = torch.autograd.grad(total, wanted, allow_unused=True)
            return torch.cat(
                [
                    (torch.zeros_like(p) if g is None else g).flatten()
                    for p, g in zip(wanted, grads)
                ]
            )

        self.settled(one, forward, expected, check=one.dtype == torch.float64)
        if self.writes(one):
            one.graphs.clear()

    def gradient(self, one: Owned) -> None:
        """Plain grad, of a net in training."""
        if not self.whole(one):
            return
        x = one.inputs(self.rng, 1, 3)
        self.say(f"grad of {one.name}")

        def forward() -> Tensor:
            return grad(lambda x: total_loss(one.model(x)))(x[0])

        def expected() -> Tensor:
            leaf = x.clone().requires_grad_()
            total = total_loss(reference(one.twin, leaf, self.how))
            return torch.autograd.grad(total, leaf)[0][0]

        self.settled(one, forward, expected, check=one.dtype == torch.float64)
        if self.writes(one):
            one.graphs.clear()

    def ensemble(self, one: Owned) -> None:
        """Members with parameters and buffers of their own, which nothing writes."""
        if not self.whole(one) or self.writes(one) or self.unclear(one):
            return
        if not one.functional:
            return
        self.say(f"ensemble of {one.name}")
        members = [copy.deepcopy(one.twin) for _ in range(2)]
        with torch.no_grad():
            for number, member in enumerate(members):
                for p in member.parameters():
                    p.mul_(1 + number)
        params, buffers = plain(stack_module_state)(members)
        before = {k: v.clone() for k, v in buffers.items()}
        x = one.inputs(self.rng, 1, 3)
        twins = dict(zip(one.twin.modules(), zip(*[m.modules() for m in members])))
        back = {copied: b for b, both in twins.items() for copied in both}

        def how(module: nn.Module) -> Cover | None:
            cover = self.how(back[module])
            assert cover is not None
            frozen = {copied for b in cover.frozen for copied in twins.get(b, ())}
            return dataclasses.replace(cover, frozen=frozen)

        def forward() -> Tensor:
            f = vmap(lambda p, b: functional_call(one.model, (p, b), (x[0],)))
            return f(params, buffers)

        def expected() -> Tensor:
            return torch.cat([reference(m, x, how) for m in members])

        self.settled(one, forward, expected)
        for key, value in buffers.items():
            if not torch.equal(value, before[key]):
                raise Mismatch(f"{key} of the ensemble was written")

    def four_functions(self, one: Owned) -> None:
        """Per-sample gradients and their kin: a block of their own."""
        if one.said or self.shared:
            return
        if not any(p.requires_grad for p in one.model.parameters()):
            return
        x = one.inputs(self.rng, 3, 1)[:, 0]
        functions: list[Callable[..., object]] = [
            per_sample_grads,
            per_sample_grad_norms,
            lambda *a, **k: clipped_grad_sum(*a, max_grad_norm=1.0, **k),
            lambda *a, **k: per_sample_sketch(*a, k=3, **k),
        ]
        f = self.rng.choice(functions)
        mode = self.rng.choice(["eval", "no_running_stats", "sync"])
        if self.rng.random() < 0.2:
            Fuse.forward_raises = self.plan("forward")
        self.say(f"per-sample gradients of {one.name}, {mode}")
        covers = [self.cover(one, one.model, {"mode": mode})]
        self.covers.extend(covers)

        def forward() -> Tensor:
            f(one.model, total_loss, x, mode=mode)
            return torch.zeros(())

        def expected() -> Tensor:
            reference(one.twin, x[None], self.how)
            return torch.zeros(())

        try:
            self.settled(one, forward, expected)
        finally:
            del self.covers[-1]

    def checkpointed(self, one: Owned) -> None:
        """Inside, the plain numbers; after the block an error in words, or those."""
        if not self.whole(one) or self.unclear(one) or self.writes(one):
            return
        if any(isinstance(m, Assigned) for m in one.model.modules()):
            return
        x = one.inputs(self.rng, 1, 3).requires_grad_()
        reentrant = self.rng.random() < 0.5
        self.say(f"checkpoint of {one.name}, use_reentrant={reentrant}")
        grads: list[Tensor | None] = []

        def forward() -> Tensor:
            out = checkpoint(one.model, x[0], use_reentrant=reentrant)
            for model in (one.model, one.twin):
                model.zero_grad()
            total_loss(out).backward()
            grads.extend(p.grad for p in one.model.parameters())
            return out[None]

        def expected() -> Tensor:
            out = reference(one.twin, x, self.how)
            total_loss(out).backward()
            return out

        self.settled(one, forward, expected)

    def without_a_block(self, one: Owned, held: list[Cover]) -> None:
        """A forward in a thread that has no block, while another thread has: right, or
        an error in words. Where the owner's flags are the block's, never an error."""
        x = one.inputs(self.rng, 1, 3)
        self.say(f"forward of {one.name} in a thread without a block")
        twin = copy.deepcopy(one.twin)
        wanted = plain(lambda: twin(x[0]))()
        same_flags = all(
            not m.training and cover.mode == "eval"
            for cover in held
            for m in cover.modules
            if is_norm(m)
        )
        try:
            found = one.model(x[0])
        except BlockError:
            if same_flags:
                raise Mismatch("refused, though the flags are the owner's")
            found = None
        for (_, a, b), c in zip(one.pairs(), twin.modules()):
            for key, tensor in a._buffers.items():
                mine, right = b._buffers[key], c._buffers[key]
                if tensor is None or mine is None or right is None:
                    continue
                if same(tensor, right):
                    mine.copy_(right)
                elif found is not None or not same(tensor, mine):
                    raise Mismatch(f"a forward without a block left {key} wrong")
        one.graphs.clear()
        for _, a, b in one.pairs():
            if isinstance(a, Assigned):
                one.tensors[a, "mu"] = a._buffers["mu"]
        if found is not None and not same(found, wanted):
            raise Mismatch(f"without a block: {shown(found)}, not {shown(wanted)}")

    # Threads -----------------------------------------------------------------------

    def thread(self, one: Owned) -> None:
        """Another thread, while this one waits."""
        covers = self.of(one)
        if (
            self.shared
            or self.unclear(one)
            or one.removed
            or any(c.touched for c in covers)
        ):
            return
        what = self.rng.choice(["forward", "same", "other"])
        if what == "forward":
            with Thread(lambda: self.without_a_block(one, covers)) as thread:
                thread.start()
            return
        if not covers or any(
            c.options != covers[0].options or c.root is not covers[0].root
            for c in covers
        ):
            return
        root = {b: a for _, a, b in one.pairs()}[covers[0].root]
        options = dict(covers[0].options)
        if what == "same":
            self.say(f"{one.name} entered in another thread with the same options")
            x = one.inputs(self.rng, 1, 2)
            runs = covers[0].root is one.twin and not self.writes(one)

            def work() -> Tensor | None:
                with vmap_safe(root, **options):
                    return one.model(x[0]) if runs else None

            with Thread(work) as thread:
                thread.start()
            if runs:
                wanted = plain(lambda: reference(one.twin, x, self.how))()
                if not same(thread.result, wanted[0]):
                    raise Mismatch("another number in another thread")
            return
        other: ModeName = "no_running_stats" if options["mode"] == "eval" else "eval"
        if not any(isinstance(m, _BatchNorm) for m in root.modules()):
            return
        self.say(f"{one.name} entered in another thread with {other}")

        def refused() -> None:
            try:
                with vmap_safe(root, mode=other):
                    raise Mismatch("another thread entered with other options")
            except BlockError as error:
                if len(str(error)) < 40:
                    raise Mismatch("no words")

        with Thread(refused) as thread:
            thread.start()

    # Copies and writes -------------------------------------------------------------

    def copied(self, one: Owned) -> None:
        """A copy has the owner's flags and is not covered."""
        how = self.rng.choice(["deepcopy", "pickle", "torch.save"])
        self.say(f"{how} of {one.name}")
        if how == "deepcopy":
            twin, made = copy.deepcopy(one.twin), copy.deepcopy(one.model)
        elif how == "pickle":
            twin = copy.deepcopy(one.twin)
            made = pickle.loads(pickle.dumps(one.model))
        else:
            twin, file = copy.deepcopy(one.twin), io.BytesIO()
            torch.save(one.model, file)
            file.seek(0)
            made = torch.load(file, weights_only=False)
        other = Owned("copy", made)
        other.twin = twin
        for b, c in zip(one.twin.modules(), twin.modules()):
            if b in one.said:
                other.said[c] = one.said[b]
        for p, q in zip(made.parameters(), twin.parameters()):
            p.grad = q.grad = None
        found = list(other.differences(set(), True))
        if found:
            raise Mismatch("copy: " + "; ".join(found[:4]))
        if not one.said and self.rng.random() < 0.5:
            x = one.inputs(self.rng, 3)
            if not same(made(x), plain(lambda: twin(x))()):
                raise Mismatch("a copy computes something else")
            for mine, other_one in zip(made.buffers(), twin.buffers()):
                if not same(mine, other_one):
                    raise Mismatch("a copy writes something else")

    def state_dict(self, one: Owned) -> None:
        self.say(f"state_dict of {one.name}")
        found, wanted = one.model.state_dict(), one.twin.state_dict()
        if list(found) != list(wanted) or not all(
            same(found[k], wanted[k]) for k in wanted
        ):
            raise Mismatch("state_dict is another one")
        for key, value in one.model.state_dict(keep_vars=True).items():
            path, _, name = key.rpartition(".")
            module = one.model.get_submodule(path)
            if value is not one.tensors.get((module, name)):
                raise Mismatch(f"state_dict has another {key}")

    def write(self, one: Owned) -> None:
        """What an owner may do to a model at any time."""
        rng, seed = self.rng, self.rng.randrange(1 << 30)
        paths = [n for n, m in one.model.named_modules() if m._buffers]
        path = rng.choice(paths)
        kind = rng.choice(sorted(WRITES))
        self.say(f"{kind} on {one.name}[{path!r}]")
        one.graphs.clear()
        for model in (one.model, one.twin):
            torch.manual_seed(seed)
            f = WRITES[kind]
            (f if model is one.model else plain(f))(model, path)
        one.remember()

    def step(self, one: Owned) -> None:
        """An optimizer step."""
        self.say(f"optimizer step on {one.name}")
        one.graphs.clear()
        for optimizer in self.optimizers[one]:
            optimizer.step()

    def replace(self, one: Owned) -> None:
        """Another layer in the place of one; what the old one was, it has to be."""
        names = [n for n, m in one.model.named_children() if not isinstance(m, Fuse)]
        name = self.rng.choice(names)
        self.say(f"{one.name}[{name!r}] replaced")
        one.graphs.clear()
        for cover in self.of(one):
            cover.replaced = cover.touched = True
        old = one.model.get_submodule(name), one.twin.get_submodule(name)
        new = nn.BatchNorm1d(C).to(one.dtype)
        new.train(self.rng.random() < 0.5)
        setattr(one.model, name, new)
        setattr(one.twin, name, copy.deepcopy(new))
        if old[0] not in set(one.model.modules()):
            one.removed.append(old)
        one.remember()

    def hook(self, one: Owned) -> None:
        """A hook of the owner's own, which stays, and may raise."""
        self.say(f"hook on {one.name}")

        children = list(one.model.named_children())
        name, _ = self.rng.choice(
            [c for c in children if not c[1]._buffers] or children
        )
        for model in (one.model, one.twin):
            model.get_submodule(name).register_forward_pre_hook(_looks)

    def raised(self, one: Owned) -> None:
        """An error in the body of the block."""
        error = self.plan("the body")
        if self.levels == 0:
            self.planned = None
            return
        raise error

    def closed_again(self, one: Owned) -> None:
        """A block that is not open cannot be left."""
        self.say("a block is left that is not open")
        try:
            vmap_safe(one.model).__exit__(None, None, None)
        except BlockError:
            return
        raise Mismatch("left without an error")


STEPS = [
    ("forward", 10),
    ("backward", 4),
    ("interrupted_backward", 1),
    ("rows", 3),
    ("gradient", 2),
    ("ensemble", 2),
    ("four_functions", 2),
    ("checkpointed", 1),
    ("train", 4),
    ("train_layer", 2),
    ("thread", 2),
    ("copied", 3),
    ("state_dict", 1),
    ("write", 4),
    ("step", 1),
    ("replace", 0.5),
    ("hook", 0.5),
    ("raised", 2),
    ("closed_again", 0.5),
]
FORWARDS = {
    "forward",
    "backward",
    "interrupted_backward",
    "rows",
    "gradient",
    "ensemble",
    "four_functions",
    "checkpointed",
    "thread",
}
WAYS = [
    "with",
    "with",
    "with",
    "stack",
    "twice",
    "decorated",
    "recursion",
    "generator",
    "resumed",
    "twofold",
    "default_device",
    "wrong_order",
    "straggler",
    "finalised",
]


def _looks(module: nn.Module, args: object) -> None:
    """A hook."""


def _load(model: nn.Module, path: str) -> None:
    state = model.state_dict()
    model.load_state_dict({k: _other(v) for k, v in state.items()})


def _load_old(model: nn.Module, path: str) -> None:
    """A checkpoint from before batches were counted."""
    state = {k: _other(v) for k, v in model.state_dict().items()}
    for key in [k for k in state if k.endswith("num_batches_tracked")]:
        del state[key]
    model.load_state_dict(state)


def _other(tensor: Tensor) -> Tensor:
    if not tensor.is_floating_point():
        return tensor + 3
    return tensor * 1.1 + 0.1


def _in_place(model: nn.Module, path: str) -> None:
    for buffer in model.get_submodule(path)._buffers.values():
        if buffer is not None:
            buffer.copy_(_other(buffer))


def _assigned(model: nn.Module, path: str) -> None:
    module = model.get_submodule(path)
    for name, buffer in module._buffers.items():
        if buffer is not None:
            setattr(module, name, _other(buffer))


def _reset(model: nn.Module, path: str) -> None:
    for module in model.modules():
        if isinstance(module, _NormBase):
            module.reset_running_stats()


def _momentum(model: nn.Module, path: str) -> None:
    module = model.get_submodule(path)
    if hasattr(module, "momentum"):
        setattr(module, "momentum", 0.3)
    setattr(module, "note", "mine")


def _frozen(model: nn.Module, path: str) -> None:
    model.get_submodule(path).requires_grad_(False)


WRITES: dict[str, Callable[[nn.Module, str], object]] = {
    "load_state_dict": _load,
    "load_state_dict of an old checkpoint": _load_old,
    "write in place": _in_place,
    "assignment": _assigned,
    "reset_running_stats": _reset,
    "attributes": _momentum,
    "requires_grad_(False)": _frozen,
    "double()": lambda model, path: model.double(),
    "float()": lambda model, path: model.float(),
    "zero_grad()": lambda model, path: model.zero_grad(),
}


class Thread(threading.Thread):
    """Joined at the end of its ``with``, which raises what it raised."""

    def __init__(self, work: Callable[[], object]) -> None:
        super().__init__(daemon=True)
        self.work, self.started = work, False
        self.error: BaseException | None = None
        self.result: Any = None

    def start(self) -> None:
        self.started = True
        super().start()

    def run(self) -> None:
        try:
            self.result = self.work()
        except BaseException as error:
            self.error = error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: object, error: BaseException | None, traceback: object
    ) -> None:
        if not self.started:
            return
        self.join(60)
        if self.is_alive():
            raise Mismatch("a thread hangs")
        if self.error is not None and error is None:
            raise self.error


def _global_hooks() -> dict[str, dict[object, object]]:
    return {
        name: dict(table)
        for name, table in vars(torch_module).items()
        if name.startswith("_global_") and isinstance(table, dict)
    }


def run(
    seed: int, echo: bool = False, without: Sequence[str] = ()
) -> tuple[str, list[str]] | None:
    """None, or what is wrong and the program up to there."""
    Fuse.forward_raises = Fuse.backward_raises = None
    if not gc.get_freeze_count():
        gc.collect()
        gc.freeze()  # which makes the many collections cheap
    program = Program(seed, echo, without)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program.run()
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt) and error is not program.planned:
            raise
        where = traceback.format_exc().splitlines()
        text = "\n".join(program.lines)
        return f"{text}\n{type(error).__name__}: {error}", where
    finally:
        while torch._C._len_torch_function_stack():
            _pop_mode()
    return None


def main() -> bool:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, help="run this program, and print it")
    parser.add_argument("--start", type=int, default=0, help="the first seed of many")
    parser.add_argument("--programs", type=int, default=1000)
    parser.add_argument("--without", nargs="*", default=(), help="steps to leave out")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.seed is not None:
        found = run(arguments.seed, True, arguments.without)
        if found:
            print("\n".join(found[1]))
        return bool(found)
    failed, began = [], time.monotonic()
    for seed in range(arguments.start, arguments.start + arguments.programs):
        found = run(seed, False, arguments.without)
        if found:
            failed.append(seed)
            print(f"--seed {seed}: {found[0].splitlines()[-1][:300]}", flush=True)
    seconds = time.monotonic() - began
    print(f"{len(failed)} of {arguments.programs} programs failed, {seconds:.0f} s")
    return bool(failed)


if __name__ == "__main__":
    raise SystemExit(main())
