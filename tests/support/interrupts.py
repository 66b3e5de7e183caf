"""KeyboardInterrupt at each line of the package, and at random times.

A run of a scenario forks at every line that the package comes to: the child is
interrupted there and looks at what is left, the parent goes on. Interrupts at random
times also meet torch's code and the user's.

    python tests/support/interrupts.py                 each line of each scenario
    python tests/support/interrupts.py --opcodes       each instruction
    python tests/support/interrupts.py --times 2000    that many random times
"""

import argparse
import collections
import copy
import dis
import gc
import linecache
import os
import random
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Generator, Iterator
from types import FrameType
from typing import Any, Self

import torch
import torch.nn.functional as F
from plain import ModeName
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.modules import module as torch_module

import vmapsafe
from vmapsafe import (
    batched,
    clipped_grad_sum,
    per_sample_grad_norms,
    per_sample_grads,
    vmap_safe,
)

Scenario = Callable[[nn.Sequential, Tensor, Tensor], None]

HANGS = 10  # seconds
HOME = os.path.dirname(vmapsafe.__file__)


class Assigned(nn.Module):
    """A hand-made layer that assigns its buffer."""

    mu: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mu", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        out = x - self.mu
        self.mu = 0.9 * self.mu + 0.1 * x.mean(0).detach()
        return out


def made() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(3, 4), nn.BatchNorm1d(4), Assigned(), nn.Tanh(), nn.Linear(4, 2)
    ).double()
    for _ in range(3):
        model(torch.randn(8, 3, dtype=torch.float64) * 2 + 1)
    frozen = nn.BatchNorm1d(2).double().eval()
    return nn.Sequential(*model, frozen)


MODES: dict[ModeName, dict[str, Any]] = {
    "eval": {},
    "no_running_stats": {},
    "group_norm": {"num_groups": 2},
    "sync": {},
}

# -- Scenarios -------------------------------------------------------------------------

SCENARIOS: dict[str, Scenario] = {}


def scenario(f: Scenario) -> Scenario:
    SCENARIOS[f.__name__] = f
    return f


def block(mode: ModeName) -> Scenario:
    def f(model: nn.Sequential, x: Tensor, y: Tensor) -> None:
        with vmap_safe(model, mode=mode, **MODES[mode]):
            vmap(model)(x)

    return f


for _mode in MODES:
    SCENARIOS[f"block_{_mode}"] = block(_mode)


@scenario
def nested(model: nn.Sequential, x: Tensor, y: Tensor) -> None:
    with vmap_safe(model, mode="sync"):
        with vmap_safe(model[:3]):
            model(x[0])
        with vmap_safe(model, mode="group_norm", num_groups=2):
            model(x[0])


@scenario
def two_models(model: nn.Sequential, x: Tensor, y: Tensor) -> None:
    other = copy.deepcopy(model)
    with vmap_safe(model, other, mode="no_running_stats"):
        other(model(x[0])[:, [0, 1, 0]])


@scenario
def decorated(model: nn.Sequential, x: Tensor, y: Tensor) -> None:
    @vmap_safe
    def f(model: nn.Sequential, again: bool) -> Tensor:
        return f(model, False) if again else model(x[0])

    f(model, True)


@scenario
def resumed(model: nn.Sequential, x: Tensor, y: Tensor) -> None:
    @vmap_safe(mode="sync")
    def f(model: nn.Sequential) -> Generator[Tensor, None, None]:
        yield model(x[0])
        yield model(x[0])

    generator = f(model)
    next(generator)
    next(generator)
    generator.close()


@scenario
def waiting(model: nn.Sequential, x: Tensor, y: Tensor) -> None:
    def f() -> Iterator[Tensor]:
        with vmap_safe(model):
            yield model(x[0])

    generator = f()
    next(generator)
    del generator


@scenario
def own_rows(model: nn.Sequential, x: Tensor, y: Tensor) -> None:
    params = {k: p.detach() for k, p in model.named_parameters()}

    def loss(params: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(model, params, (x,)), y)

    with vmap_safe(model, mode="sync"):
        vmap(grad(loss), (None, 0, 0))(params, x, y)


@scenario
def backward(model: nn.Sequential, x: Tensor, y: Tensor) -> None:
    with vmap_safe(model, mode="group_norm", num_groups=2):
        out = vmap(model)(x).square().sum()
        torch.autograd.grad(out, list(model.parameters()))
    with vmap_safe(model, mode="sync"):
        out = vmap(model)(x).square().sum()
    torch.autograd.grad(out, list(model.parameters()))


@scenario
def written_for_a_batch(model: nn.Sequential, x: Tensor, y: Tensor) -> None:
    with vmap_safe(model):
        batched(lambda x: model(x))(x[0])


@scenario
def rows(model: nn.Sequential, x: Tensor, y: Tensor) -> None:
    per_sample_grads(model, F.cross_entropy, x[0], y[0])


@scenario
def rows_of_all_together(model: nn.Sequential, x: Tensor, y: Tensor) -> None:
    per_sample_grads(model, F.cross_entropy, x[0], y[0], mode="sync")


@scenario
def norms(model: nn.Sequential, x: Tensor, y: Tensor) -> None:
    per_sample_grad_norms(model, F.cross_entropy, x[0], y[0], chunk_size=2)


@scenario
def clipped(model: nn.Sequential, x: Tensor, y: Tensor) -> None:
    clipped_grad_sum(model, F.cross_entropy, x[0], y[0], max_grad_norm=1.0)


# -- What has to hold afterwards -------------------------------------------------------


# Modules, tables of hooks on all modules, and filters of warnings.
Seen = tuple[dict[str, tuple[object, ...]], dict[str, dict[object, object]], list[Any]]


class Known:
    """A model, how it is, and what it computes in each mode."""

    def __init__(self, scenario: Scenario) -> None:
        self.model, self.other = made(), made()
        self.x = torch.randn(3, 4, 3, dtype=torch.float64)
        self.y = torch.randint(2, (3, 4))
        for _ in range(2):  # some things are done once a process
            scenario(self.model, self.x, self.y)
            self.computed()
        gc.collect()
        gc.freeze()  # what is here now is nothing that an interrupt leaves
        self.before = self.state()
        self.values = {
            (id(t), k): t.detach().clone() for k, t in self.model.state_dict().items()
        }
        self.results = self.computed()

    def state(self) -> Seen:
        """All that is compared by identity."""
        modules: dict[str, tuple[object, ...]] = {}
        for name, m in self.model.named_modules():
            modules[name] = (
                m.training,
                getattr(m, "track_running_stats", None),
                sorted(vars(m)),
                [(k, id(t)) for k, t in m._parameters.items()],
                [(k, id(t)) for k, t in m._buffers.items()],
                {k: len(v) for k, v in vars(m).items() if k.endswith("_hooks")},
            )
        tables: dict[str, dict[object, object]] = {
            name: dict(table)
            for name, table in vars(torch_module).items()
            if name.startswith("_global_") and isinstance(table, dict)
        }
        return modules, tables, list(warnings.filters)

    def computed(self) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for mode, options in MODES.items():
            with vmap_safe(self.model, mode=mode, **options):
                found[mode] = vmap(self.model)(self.x).detach()
        plain = copy.deepcopy(self.model)
        found["plain"] = plain(self.x[0]).detach()
        for name, buffer in plain.named_buffers():
            found[name] = buffer
        return found

    def wrong(self) -> str:
        """What is wrong, in words; "" if nothing is."""
        gc.collect()
        try:
            with vmap_safe(self.other):
                pass
            if torch._C._len_torch_function_stack():
                return "a mode is left"
            modules, tables, filters = self.state()
            for name, now in modules.items():
                then = self.before[0][name]
                if now != then:
                    off = [str((a, b)) for a, b in zip(then, now) if a != b]
                    return f"{name} was and is {'; '.join(off)[:300]}"
            if tables != self.before[1]:
                return "hooks on all modules are left"
            if filters != self.before[2]:
                return f"filters of warnings are left: {filters[:2]}"
            for (_, name), value in self.values.items():
                if not torch.equal(self.model.state_dict()[name], value):
                    return f"{name} was written"
            for name, p in self.model.named_parameters():
                if p.grad is not None:
                    return f"{name} has a gradient"
            if torch._C._functorch.maybe_current_level() is not None:
                return ""  # torch's own: one of its levels is left, nothing can be run
            found = self.computed()
            for key, value in self.results.items():
                if not torch.equal(found[key], value):
                    return f"another {key}"
            modes: tuple[ModeName, ...] = ("eval", "sync")
            for mode in modes:
                said = in_a_thread(lambda: self.enter(mode))
                if said:
                    return f"in another thread: {said}"
        except BaseException as error:
            return f"then {type(error).__name__}: {str(error)[:200]}"
        return ""

    def enter(self, mode: ModeName) -> None:
        with vmap_safe(self.model, mode=mode):
            self.model(self.x[0])


def in_a_thread(work: Callable[[], object]) -> str:
    said = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            said.append(f"{type(error).__name__}: {str(error)[:200]}")

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return "".join(said)


def child_says(child: Callable[[], str]) -> tuple[int, int, int]:
    """What ``child`` returns in a fork of this process, in which it may do anything."""
    read, write = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of forks beside threads
        pid = os.fork()
    if not pid:
        said = "died"
        try:
            signal.alarm(HANGS)
            sys.unraisablehook = lambda said: None
            said = child()
        except BaseException as error:
            said = f"became {type(error).__name__}: {str(error)[:200]}"
        finally:
            os.write(write, said.encode()[:4000])
            os._exit(0)
    return pid, read, write


def heard(pid: int, read: int, write: int) -> str:
    os.close(write)
    with os.fdopen(read) as pipe:
        said = pipe.read()
    _, status = os.waitpid(pid, 0)
    return said if status == 0 else f"hangs or died ({status})"


# -- Each line -------------------------------------------------------------------------


def leaves_a_with(frame: FrameType) -> bool:
    """Whether a line is the end of a ``with``. No interrupt comes there: Python looks
    for one after calls and at jumps, and the next of these is in ``__exit__``."""
    source = linecache.getline(frame.f_code.co_filename, frame.f_lineno)
    if not source.lstrip().startswith("with "):
        return False
    at = [i for i in dis.get_instructions(frame.f_code) if i.offset == frame.f_lasti]
    by = (at[0].opname, at[0].argval) if at else ("", "")
    return by[0] in ("SWAP", "PUSH_EXC_INFO") or by == ("LOAD_CONST", None)


def repeats_inside_a_line(frame: FrameType) -> bool:
    """Whether a line is seen again because of a loop in it, such as a comprehension.

    What a trace function raises there skips the ``__exit__`` of a ``with`` around the
    comprehension (Python 3.12.1 and 3.13.0). A real interrupt does not.
    """
    opcode = dis.opname[frame.f_code.co_code[frame.f_lasti]]
    return sys.version_info >= (3, 12) and opcode in ("FOR_ITER", "JUMP_BACKWARD")


class Interrupted:
    """Runs a scenario; each ``every``-th line is interrupted, in a fork."""

    def __init__(
        self, name: str, every: int = 1, first: int = 0, opcodes: bool = False
    ) -> None:
        self.run, self.every, self.opcodes = SCENARIOS[name], every, opcodes
        self.count, self.first = 0, first
        self.known = Known(self.run)
        self.child: int | None = None
        self.bad: collections.Counter[str] = collections.Counter()
        self.tried = 0

    def start(self) -> Self:
        known, kind = self.known, ""
        try:
            sys.settrace(self.trace)
            self.run(known.model, known.x, known.y)
            sys.settrace(None)
        except BaseException as error:
            sys.settrace(None)
            if self.child is None:
                raise
            kind = type(error).__name__
        # The exception is gone only now, and with it what its frames held.
        if self.child is None:
            wrong = known.wrong()
            if wrong:
                raise AssertionError(f"without an interrupt: {wrong}")
            return self
        said = known.wrong()
        if not kind and said:  # somebody took it for his own
            said = f"swallowed; {said}"
        elif kind not in ("", "KeyboardInterrupt"):
            said = f"became {kind}; {said}"
        os.write(self.child, said.encode()[:4000])
        os._exit(0)

    def trace(self, frame: FrameType, event: str, argument: object) -> Any:
        if not frame.f_code.co_filename.startswith(HOME):
            return None
        frame.f_trace_opcodes = self.opcodes
        if event == ("opcode" if self.opcodes else "line"):
            if not self.opcodes and leaves_a_with(frame):
                return self.trace
            self.count += 1
            if (self.count - self.first) % self.every == 0:
                if not repeats_inside_a_line(frame):
                    self.interrupt(frame)
        return self.trace

    def interrupt(self, frame: FrameType) -> None:
        read, write = os.pipe()
        pid = os.fork()
        if not pid:
            sys.settrace(None)
            signal.alarm(HANGS)
            sys.unraisablehook = lambda said: None  # in a generator that is deleted
            os.close(read)
            self.child = write
            raise KeyboardInterrupt
        self.tried += 1
        said = heard(pid, read, write)
        if said:
            code = frame.f_code
            file = os.path.relpath(code.co_filename, HOME)
            place = f"{file}:{frame.f_lineno} ({code.co_qualname})"
            self.bad[f"{place}: {said}"] += 1


# -- Random times ----------------------------------------------------------------------


def at_random_times(name: str, times: int, seed: int = 0) -> collections.Counter[str]:
    """Faults by what they are, of that many interrupts, each in a fork."""
    rng = random.Random(f"{name} {seed}")
    run = SCENARIOS[name]
    known = Known(run)
    began = time.perf_counter()
    for _ in range(5):
        run(known.model, known.x, known.y)
    each = (time.perf_counter() - began) / 5
    bad: collections.Counter[str] = collections.Counter()

    def child(delay: float) -> str:
        try:
            interrupt_after(delay)
            end = time.monotonic() + 5  # Python drops one that strikes in a finalizer
            while time.monotonic() < end:
                run(known.model, known.x, known.y)
        except KeyboardInterrupt:
            pass
        except RuntimeError as error:  # torch's own, interrupted where it ends a level
            if "dynamicLayerStack" not in str(error):
                raise
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(HANGS)
        return known.wrong()

    for _ in range(times):
        delay = rng.uniform(1e-5, 4 * each)
        said = heard(*child_says(lambda: child(delay)))
        if said:
            bad[said] += 1
    return bad


def interrupt_after(delay: float) -> None:
    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, delay)


def main() -> bool:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("scenarios", nargs="*", default=list(SCENARIOS))
    parser.add_argument("--every", type=int, default=1, help="each that many-th line")
    parser.add_argument("--opcodes", action="store_true")
    parser.add_argument("--times", type=int, help="interrupts at random times instead")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    short = 0
    for name in arguments.scenarios:
        began = time.monotonic()
        if arguments.times:
            tried, bad = arguments.times, at_random_times(name, arguments.times)
        else:
            found = Interrupted(name, arguments.every, 0, arguments.opcodes).start()
            tried, bad = found.tried, found.bad
        short += sum(bad.values())
        for what, count in bad.most_common(15):
            print(f"    {count} x {what}")
        seconds = time.monotonic() - began
        print(f"{name}: {sum(bad.values())} of {tried}, {seconds:.0f} s", flush=True)
    return bool(short)


if __name__ == "__main__":
    raise SystemExit(main())
