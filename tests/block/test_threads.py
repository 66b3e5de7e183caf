"""Several threads, forks, signal handlers and finalizers around one model."""

import contextlib
import copy
import gc
import os
import signal
import sys
import threading
import time
import weakref

import pytest
import torch
import torch.nn.functional as F
from blocks import MODES
from threads import in_a_thread, together
from torch import nn
from torch.func import vmap

from vmapsafe import (
    BlockError,
    clipped_grad_sum,
    per_sample_grad_norms,
    per_sample_grads,
    per_sample_sketch,
    vmap_safe,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:clipped_grad_sum"),  # in "sync"
    pytest.mark.filterwarnings("ignore::vmapsafe.NeverUpdatedWarning"),
    # A fork while other threads run is what is tried here.
    pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning"),
]


def small(layers=1):
    """Float64, trained a little, one layer frozen."""
    torch.manual_seed(0)
    parts = [nn.Linear(3, 4)]
    for _ in range(layers):
        parts += [nn.BatchNorm1d(4), nn.Tanh()]
    model = nn.Sequential(*parts, nn.BatchNorm1d(4), nn.Linear(4, 2)).double()
    for _ in range(3):
        model(torch.randn(8, 3, dtype=torch.float64) * 2 + 1)
    model[-2].eval()
    return model


def options_of(mode):
    return {"mode": mode, **({"num_groups": 2} if mode == "group_norm" else {})}


def flags(model):
    return [
        (m.training, getattr(m, "track_running_stats", None)) for m in model.modules()
    ]


def buffers(model):
    return {k: (b, b.clone()) for k, b in model.named_buffers()}


def assert_untouched(model, before):
    for key, buffer in model.named_buffers():
        assert buffer is before[key][0], f"{key} is another tensor"
        assert torch.equal(buffer, before[key][1]), f"{key} was written"


@contextlib.contextmanager
def eager_switches():
    """Threads change places as often as Python can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


def close(a, b):
    """torch.testing.assert_close spends its first second on imports."""
    if isinstance(b, dict):
        return a.keys() == b.keys() and all(close(a[k], b[k]) for k in b)
    return torch.allclose(a, b, rtol=1e-9, atol=1e-12)


def for_seconds(seconds):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        yield


# -- Entering and leaving -------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_two_threads_enter_and_leave(mode):
    """With the same options, the flags are as before, whichever thread leaves last."""
    model = small(layers=50)
    before, values = flags(model), buffers(model)
    entered = []

    def work():
        for _ in for_seconds(0.7):
            with vmap_safe(model, **options_of(mode)):
                pass
            entered.append(1)

    with eager_switches():
        together(work, work, work)
    assert len(entered) > 10
    assert flags(model) == before
    assert_untouched(model, values)


@pytest.mark.parametrize("mode", MODES)
def test_two_threads_compute(mode):
    """With the same options, both threads always compute the right numbers."""
    model = small()
    before, values = flags(model), buffers(model)
    x = torch.randn(4, 5, 3, dtype=torch.float64)
    with vmap_safe(model, **options_of(mode)):
        want = vmap(model)(x)

    def work():
        for _ in for_seconds(0.7):
            with vmap_safe(model, **options_of(mode)):
                assert torch.equal(vmap(model)(x), want)

    with eager_switches():
        together(work, work, work)
    assert flags(model) == before
    assert_untouched(model, values)


def test_other_options_in_another_thread():
    """The call is refused or, if no other thread holds the model, right."""
    model = small(layers=5)
    before, values = flags(model), buffers(model)
    x = torch.randn(4, 5, 3, dtype=torch.float64)
    want = {}
    for mode in MODES:
        with vmap_safe(model, **options_of(mode)):
            want[mode] = vmap(model)(x)
    outcomes = []

    def work(mode):
        for _ in for_seconds(1.0):
            try:
                with vmap_safe(model, **options_of(mode)):
                    assert torch.equal(vmap(model)(x), want[mode])
                outcomes.append(mode)
            except BlockError as error:
                assert "thread" in str(error)
                outcomes.append("refused")
                time.sleep(1e-4)

    with eager_switches():
        together(*[lambda mode=mode: work(mode) for mode in MODES])
    assert "refused" in outcomes and len(set(outcomes)) > 1
    assert flags(model) == before
    assert_untouched(model, values)


def test_the_first_thread_leaves_first():
    """The other thread's block stays open, and all is restored when it ends."""
    model = small()
    before = flags(model)
    x = torch.randn(4, 5, 3, dtype=torch.float64)
    with vmap_safe(model, mode="no_running_stats"):
        want = vmap(model)(x)
    entered, left, end = (threading.Event() for _ in range(3))

    def second():
        with vmap_safe(model, mode="no_running_stats"):
            entered.set()
            assert left.wait(30)
            assert torch.equal(vmap(model)(x), want)
        end.set()

    def first():
        with vmap_safe(model, mode="no_running_stats"):
            assert entered.wait(30)
        with pytest.raises(BlockError, match="thread"):
            vmap_safe(model, mode="eval").__enter__()
        left.set()
        assert end.wait(30)

    together(first, second)
    assert flags(model) == before
    with vmap_safe(model, mode="eval"):
        vmap(model)(x)


@pytest.mark.parametrize("mode", MODES)
def test_a_thread_that_ends_inside_a_block(mode):
    """Its block is freed: the model is as it was once another block is opened, and no
    thread is kept out for ever."""
    model, other = small(), small()
    before, values = flags(model), buffers(model)
    x = torch.randn(4, 5, 3, dtype=torch.float64)
    with vmap_safe(model, mode="sync"):
        want = vmap(model)(x)

    def work():
        block = vmap_safe(model, **options_of(mode))
        block.__enter__()
        vmap(model)(x)

    in_a_thread(work)
    gc.collect()
    with vmap_safe(other):
        pass
    assert flags(model) == before
    assert_untouched(model, values)
    with vmap_safe(model, mode="sync"):
        assert torch.equal(vmap(model)(x), want)
    assert flags(model) == before


def test_a_generator_that_ends_in_another_thread():
    """Python closes it where its last reference dies; nothing is half put back."""
    model = small()
    before = flags(model)

    def f():
        with vmap_safe(model):
            yield

    generators = [f()]
    next(generators[0])
    with contextlib.suppress(BlockError):
        in_a_thread(lambda: generators.pop().close())
    gc.collect()
    with vmap_safe(small()):
        pass
    gc.collect()
    assert flags(model) == before
    assert torch._C._len_torch_function_stack() == 0


# -- A thread without a block ---------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_training_while_another_thread_scores(mode):
    """A forward without a block is an ordinary training step, or an error that names
    the layer: never the other thread's numbers."""
    model = small(layers=3)
    twin = copy.deepcopy(model)
    x = torch.randn(4, 5, 3, dtype=torch.float64)
    batch = torch.randn(6, 3, dtype=torch.float64)
    scored, found = [], {"right": 0, "refused": 0}
    stop = threading.Event()

    def score():
        while not stop.is_set():
            with vmap_safe(model, **options_of(mode)):
                vmap(model)(x)
            scored.append(1)

    def train():
        try:
            for _ in for_seconds(1.0):
                try:
                    out = model[:-2](batch)
                except BlockError as error:
                    assert "BatchNorm1d" in str(error)
                    found["refused"] += 1
                else:
                    assert (out - expected).abs().max() < 1e-12
                    found["right"] += 1
        finally:
            stop.set()

    expected = twin[:-2](batch)
    with eager_switches():
        together(score, train)
    assert found["right"] and scored
    assert flags(model) == flags(twin)
    # Those that ran to the end counted, and no others did so in the last layer.
    last = int(model[-4].num_batches_tracked) - int(twin[-4].num_batches_tracked) + 1
    assert last == found["right"]


@pytest.mark.parametrize("mode", MODES)
def test_a_forward_without_a_block(mode):
    """Another thread holds the model and waits. The forward is right, or an error names
    the layer. It is always right if the flags are those of outside."""
    for evaluated in (False, True):
        model = small().train(not evaluated)
        if evaluated:
            model.eval()
        twin = copy.deepcopy(model)
        batch = torch.randn(6, 3, dtype=torch.float64)
        entered, end = threading.Event(), threading.Event()

        def hold():
            with vmap_safe(model, **options_of(mode)):
                entered.set()
                assert end.wait(30)

        def use():
            try:
                assert entered.wait(30)
                try:
                    found = model(batch)
                except BlockError as error:
                    assert "'1' (BatchNorm1d)" in str(error)
                    assert not (evaluated and mode == "eval")
                    assert_untouched(model, before)
                else:
                    torch.testing.assert_close(found, twin(batch))
                    for a, b in zip(model.buffers(), twin.buffers()):
                        torch.testing.assert_close(a, b)
            finally:
                end.set()

        before = buffers(model)
        together(hold, use)
        assert flags(model) == flags(twin)


# -- The four functions ---------------------------------------------------------------

FUNCTIONS = {
    "grads": per_sample_grads,
    "norms": per_sample_grad_norms,
    "sum": lambda *a, **k: clipped_grad_sum(*a, max_grad_norm=1.0, **k),
    "sketch": lambda *a, **k: per_sample_sketch(*a, k=4, **k),
}


@pytest.mark.parametrize("same", [True, False], ids=["one mode", "many modes"])
def test_the_functions_take_turns(same):
    """Several threads call them on one model, with the same options and with others."""
    model = small()
    before, values = flags(model), buffers(model)
    parameters = [(id(p), p.clone()) for p in model.parameters()]
    jobs = []
    for i, (name, f) in enumerate(FUNCTIONS.items()):
        x = torch.randn(5, 3, dtype=torch.float64)
        y = torch.randint(2, (5,))
        mode = "eval" if same else MODES[i]
        if mode in ("no_running_stats", "group_norm"):  # need more values a slice
            mode = "sync"
        want = f(model, F.cross_entropy, x, y, mode=mode)
        jobs.append((name, f, x, y, mode, want))

    def work(name, f, x, y, mode, want):
        for _ in for_seconds(1.5):
            found = f(model, F.cross_entropy, x, y, mode=mode)
            assert close(found, want)

    with eager_switches():
        together(*[lambda job=job: work(*job) for job in jobs], timeout=120)
    assert flags(model) == before
    assert_untouched(model, values)
    for (identity, value), p in zip(parameters, model.parameters()):
        assert id(p) == identity and torch.equal(p, value) and p.grad is None


def test_calls_inside_calls_that_wait_for_each_other():
    """Two threads take two models in opposite orders: an error, not a deadlock."""
    one, other = small(), small()
    x = torch.randn(5, 3, dtype=torch.float64)
    y = torch.randint(2, (5,))
    both_hold, errors = threading.Barrier(2), []

    def work(first, second):
        def loss_fn(output, y):
            if threading.current_thread() not in waited:
                waited.add(threading.current_thread())
                both_hold.wait(30)
                per_sample_grad_norms(second, F.cross_entropy, x, y_of_all)
            return F.cross_entropy(output, y)

        try:
            per_sample_grad_norms(first, loss_fn, x, y)
        except BlockError as error:
            errors.append(str(error))

    waited, y_of_all = set(), y
    together(lambda: work(one, other), lambda: work(other, one))
    assert len(errors) == 1 and "in the same order in both threads" in errors[0]


def test_an_error_that_is_kept_holds_nobody_up():
    """The frames of its traceback live on, but the call has ended."""
    model, kept = small(), []
    x = torch.randn(5, 3, dtype=torch.float64)
    y = torch.randint(2, (5,))

    def fails(output, y):
        raise KeyError("a loss that fails")

    def work():
        found.append(per_sample_grad_norms(model, F.cross_entropy, x, y))

    found = []
    try:
        per_sample_grad_norms(model, fails, x, y)
    except KeyError as error:
        kept.append(error)
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(30)
    assert found and kept


def test_the_functions_while_another_thread_holds_the_model():
    """Inside the block of its own thread it is right; elsewhere it is right, or waits
    no longer than the block, or is refused in words."""
    model = small()
    x, y = torch.randn(5, 3, dtype=torch.float64), torch.randint(2, (5,))
    want = per_sample_grads(model, F.cross_entropy, x, y)
    entered, end = threading.Event(), threading.Event()

    def hold():
        with vmap_safe(model, mode="sync"):
            entered.set()
            found = per_sample_grads(model, F.cross_entropy, x, y, mode="sync")
            assert found.keys() == want.keys()
            end.wait(1)

    def use():
        assert entered.wait(30)
        try:
            found = per_sample_grads(model, F.cross_entropy, x, y)
        except BlockError as error:
            assert "thread" in str(error)
        else:
            torch.testing.assert_close(found, want)
        end.set()

    before = flags(model)
    together(hold, use)
    assert flags(model) == before
    torch.testing.assert_close(per_sample_grads(model, F.cross_entropy, x, y), want)


# -- Forks ----------------------------------------------------------------------------


def in_a_fork(work, seconds=20):
    """Run ``work`` in a forked process; raise what it says."""
    read, write = os.pipe()
    pid = os.fork()
    if not pid:
        said = "died"
        try:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.setitimer(signal.ITIMER_REAL, seconds)
            work()
            said = ""
        except BaseException as error:
            said = f"{type(error).__name__}: {error}"
        finally:
            os.write(write, said.encode()[:2000])
            os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        said = pipe.read()
    _, status = os.waitpid(pid, 0)
    assert status == 0, f"the child hangs or died: {status}"
    assert not said, said


@pytest.mark.parametrize("mode", MODES)
def test_fork_while_another_thread_is_inside_a_block(mode):
    """The other thread does not exist in the child: the model is as outside there, and
    other options are accepted."""
    model = small()
    before, values = flags(model), buffers(model)
    x = torch.randn(4, 5, 3, dtype=torch.float64)
    want = {}
    for other in MODES:
        with vmap_safe(model, **options_of(other)):
            want[other] = vmap(model)(x)
    entered, end = threading.Event(), threading.Event()

    def child():
        gc.collect()
        for other in MODES:
            with vmap_safe(model, **options_of(other)):
                assert torch.equal(vmap(model)(x), want[other]), other
            assert flags(model) == before, other
        assert_untouched(model, values)
        per_sample_grads(model, F.cross_entropy, x[0], torch.zeros(5).long())

    def hold():
        with vmap_safe(model, **options_of(mode)):
            entered.set()
            end.wait(60)

    def fork():
        try:
            assert entered.wait(30)
            in_a_fork(child)
        finally:
            end.set()

    together(hold, fork)
    assert flags(model) == before


def test_forks_while_other_threads_enter_and_leave():
    """Whatever lock another thread holds at that moment, the child can open blocks."""
    model, others = small(), [small(layers=20) for _ in range(2)]
    x, y = torch.randn(5, 3, dtype=torch.float64), torch.randint(2, (5,))
    stop = threading.Event()

    def loss(output, y):
        """Without functions of torch that import when called: that takes a lock."""
        return (output * (y + 1)[:, None]).square().sum()

    def busy(other):
        while not stop.is_set():
            with vmap_safe(other):
                pass
            per_sample_grads(other, loss, x, y)

    def child():
        with vmap_safe(model), vmap_safe(*others, mode="sync"):
            model(x)
        per_sample_grads(model, loss, x, y)

    def forks():
        try:
            for _ in range(25):
                in_a_fork(child)
        finally:
            stop.set()

    with eager_switches():
        together(*[lambda o=o: busy(o) for o in others], forks, timeout=300)


def test_fork_inside_a_block():
    """In the child the block is open as in the parent, and can be left."""
    model = small()
    before = flags(model)
    x = torch.randn(4, 5, 3, dtype=torch.float64)
    with vmap_safe(model):
        want = vmap(model)(x)
    block = vmap_safe(model)
    block.__enter__()

    def child():
        assert torch.equal(vmap(model)(x), want)
        block.__exit__(None, None, None)
        assert flags(model) == before
        with vmap_safe(model, mode="sync"):
            vmap(model)(x)

    in_a_fork(child)
    block.__exit__(None, None, None)
    assert flags(model) == before


# -- Signal handlers and finalizers ---------------------------------------------------


@pytest.mark.parametrize("same", [False, True], ids=["another model", "the same"])
@pytest.mark.parametrize("computes", ["neither", "inside", "handler"])
def test_a_signal_handler_that_opens_a_block(same, computes):
    """At whatever line of an entry, a forward or an exit it comes. (A handler that
    itself computes in the middle of a vmap is nothing that torch can do.)"""

    def child():
        model = small(layers=3)
        other = model if same else small()
        before = flags(model), flags(other)
        x = torch.randn(4, 5, 3, dtype=torch.float64)
        with vmap_safe(model):
            want = vmap(model)(x)
        handled = []

        def handler(number, frame):
            with vmap_safe(other, mode="sync"):
                if computes == "handler":
                    other(x[0])
            handled.append(1)

        signal.signal(signal.SIGVTALRM, handler)
        signal.setitimer(signal.ITIMER_VIRTUAL, 1e-3, 1.1e-3)
        for _ in for_seconds(1):
            with vmap_safe(model):
                if computes == "inside":
                    assert torch.equal(vmap(model)(x), want)
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        assert len(handled) > 20
        assert (flags(model), flags(other)) == before

    in_a_fork(child, 15)


@pytest.mark.parametrize("work", ["block", "functions"])
def test_a_finalizer_that_opens_a_block(work):
    """Garbage is collected anywhere, in an entry or an exit too."""

    def child():
        model, other = small(layers=3), small()
        before = flags(model), flags(other)
        x = torch.randn(5, 3, dtype=torch.float64)
        y = torch.randint(2, (5,))
        with vmap_safe(model):
            want = model(x)
        rows = per_sample_grads(model, F.cross_entropy, x, y)
        finalised, errors = [], []

        class Ring:
            def __init__(self):
                self.ring = self

            def __del__(self):
                try:
                    with vmap_safe(other, mode="sync"):
                        other(x)
                    finalised.append(1)
                except BaseException as error:
                    errors.append(error)

        def ended():
            try:
                with vmap_safe(model):
                    pass
                finalised.append(1)
            except BaseException as error:
                errors.append(error)

        gc.set_threshold(7)
        for _ in for_seconds(2):
            weakref.finalize(Ring(), ended)
            if work == "block":
                with vmap_safe(model):
                    assert torch.equal(model(x), want)
            else:
                found = per_sample_grads(model, F.cross_entropy, x, y)
                assert close(found, rows)
        gc.set_threshold(700)
        gc.collect()
        assert not errors, errors[0]
        assert len(finalised) > 20
        assert (flags(model), flags(other)) == before

    in_a_fork(child, 15)
