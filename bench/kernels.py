"""Count the operations that one call runs, network by network.

A GPU starts a kernel or two for each operation. With small layers that costs more than
the arithmetic, so the counts tell what to expect of a GPU without one. They are taken
on "meta", where nothing is computed, and where vmapsafe chooses as it does on "cuda".
Operations that only make a view or ask for memory are left out: they start nothing.
"""

from __future__ import annotations

import argparse

from contenders import CLIPPED, NORMS, ROWS, Workload
from networks import GROWN, NETWORKS
from torch.utils._python_dispatch import TorchDispatchMode

CALLS = {
    "plain": ROWS["plain"],
    "vmap(grad)": ROWS["vmap(grad)"],
    "in a block": ROWS["vmap(grad) in a block"],
    "rows": ROWS["vmapsafe"],
    "vmap(grad)+clip": CLIPPED["vmap(grad)"],
    "norms": NORMS["vmapsafe"],
    "clipped sum": CLIPPED["vmapsafe"],
}

# They make a view, though their schema does not say so, or only ask for memory.
NO_KERNELS = (
    *("_unsafe_view", "_reshape_alias", "lift_fresh", "empty", "empty_like"),
    *("empty_strided", "new_empty", "new_empty_strided"),
)


class Counts(TorchDispatchMode):
    """Counts operations below vmap and autograd that start a kernel, by name."""

    def __init__(self):
        super().__init__()
        self.found = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if not is_view(function) and name not in NO_KERNELS:
            self.found[name] = self.found.get(name, 0) + 1
        return function(*args, **kwargs or {})


def is_view(function):
    """Whether a result shares memory with an argument, and nothing is written."""
    shared = [r.alias_info for r in function._schema.returns if r.alias_info]
    return bool(shared) and not any(alias.is_write for alias in shared)


def counted(run):
    """{operation: how often} of a call that has run once before."""
    run()
    with Counts() as counts:
        run()
    return counts.found


def counts(net, call, batch=128, device="meta"):
    """{operation: how often} of one call of ``CALLS``."""
    w = Workload(net, batch, device=device)
    w.max_grad_norm = 1.0  # on "meta" there is no median
    return counted(CALLS[call](w))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--nets",
        nargs="*",
        default=["ResNet-18", "ViT-like", "MobileNetV2"],
        choices=[*NETWORKS, *GROWN],
    )
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument(
        "--names", action="store_true", help="how often each operation runs"
    )
    asked = parser.parse_args()
    print(f"{'':22}", *(f"{call:>15}" for call in CALLS))
    for net in asked.nets:
        found = {call: counts(net, call, asked.batch) for call in CALLS}
        totals = (sum(by_name.values()) for by_name in found.values())
        print(f"{net:22}", *(f"{total:15}" for total in totals), flush=True)
        if asked.names:
            names = {name for by_name in found.values() for name in by_name}
            for name in sorted(names):
                shown = (by_name.get(name, 0) for by_name in found.values())
                print(f"  {name:20}", *(f"{number:15}" for number in shown))


if __name__ == "__main__":
    main()
