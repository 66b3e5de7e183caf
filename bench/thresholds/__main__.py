"""Measure what wins on a device, and propose its entries of all tables.

Run it in the folder bench, as ``python -m thresholds --device cuda``.
"""

from __future__ import annotations

import argparse
import json
import random
import textwrap
import time
from pathlib import Path

import torch

from vmapsafe.rules.products import processor

from . import batch_norm, convolution, layers, pieces, products
from .bench import best_times, summary

MODULES = (batch_norm, layers, pieces, products, convolution)
BENCHES = {bench.name: bench for module in MODULES for bench in module.BENCHES}
# Of entries that several benches fill.
FIELDS = {
    "batch_norm_operators": {"batch", "channel"},
    "convolution_regimes": {"batch", "winners", "columns", "one_by_one"},
    "formulas": {"launches", "piece"},
    "layer_norm": {"batch", "slice"},
}
# dtype, and whether convolutions may use TF32
PRECISIONS = {
    "usual": (torch.float32, True),  # what torch does if nothing is set
    "fp32": (torch.float32, False),
    "bf16": (torch.bfloat16, True),
}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--precision", default="usual", choices=PRECISIONS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--budget",
        type=float,
        default=4.0,
        help="seconds for all rounds of a case; two are always run",
    )
    parser.add_argument(
        "--limit",
        type=float,
        default=float("inf"),
        help="seconds after which no case begins; 0 only proposes what FILE says",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="where rows are added as they come; those that are there are not repeated",
    )
    parser.add_argument("--only", nargs="*", default=list(BENCHES), choices=BENCHES)
    parser.add_argument("--most", type=int, help="cases of each bench, at most")
    asked = parser.parse_args(argv)
    if asked.limit:
        torch.empty(1, device=asked.device)  # or an error that says why not
    torch.set_num_threads(1)
    benches = [BENCHES[name] for name in asked.only]
    found = Rows(asked)
    try:
        # torch warns in every call that its own attention is a loop.
        torch._C._functorch._set_vmap_fallback_warning_enabled(False)
        measure(benches, found, asked)
    except KeyboardInterrupt:
        print("interrupted")
    finally:
        torch._C._functorch._set_vmap_fallback_warning_enabled(True)
    show(benches, found, asked.device)


class Rows:
    """What was measured, by the name of the bench; kept in a file if there is one."""

    def __init__(self, asked):
        self.head = {"device": asked.device, "precision": asked.precision}
        self.path, self.found = asked.out, {}
        lines = []
        if self.path and self.path.exists():
            lines = self.path.read_text().splitlines()
        for line in lines:
            row = json.loads(line)
            if {name: row.get(name) for name in self.head} == self.head:
                self._take(row)

    def _take(self, row):
        rows = self.found.setdefault(row["bench"], {})
        rows[json.dumps(row["case"])] = row["case"], row["seconds"]

    def add(self, bench, case, seconds):
        row = {**self.head, "bench": bench.name, "case": case, "seconds": seconds}
        self._take(row)
        if self.path:
            with self.path.open("a") as file:
                file.write(json.dumps(row) + "\n")

    def has(self, bench, case):
        return json.dumps(case) in self.found.get(bench.name, {})

    def of(self, bench):
        return list(self.found.get(bench.name, {}).values())


def measure(benches, found, asked):
    """Fill ``found``. Each bench has a share of the time that is left."""
    end = time.monotonic() + asked.limit
    dtype, allow_tf32 = PRECISIONS[asked.precision]
    for i, bench in enumerate(benches):
        left = end - time.monotonic()
        share = bench.share / sum(other.share for other in benches[i:])
        until = time.monotonic() + left * share
        cases = list(bench.cases(asked.device))
        # Whatever the time allows shall be of all kinds.
        random.Random(0).shuffle(cases)
        for case in cases[: asked.most]:
            if found.has(bench, case):
                continue
            if time.monotonic() >= until:
                break
            text = ", ".join(f"{name} {value}" for name, value in case.items())
            torch.manual_seed(0)
            try:
                contenders = bench.contenders(asked.device, dtype, **case)
                seconds = best_times(
                    contenders,
                    *(asked.device, dtype, allow_tf32, asked.rounds, asked.budget),
                )
            except Exception as error:
                # It may be out of memory. The case is tried again in the next run.
                first = (str(error).splitlines() or [""])[0]
                why = f"{type(error).__name__}: {first}"
                print(f"{bench.name}: {text}: {why}", flush=True)
                continue
            found.add(bench, case, seconds)
            print(f"{bench.name}: {text}: {relative(seconds)}", flush=True)


def relative(seconds):
    first, *names = seconds
    ratios = [f"{name} {seconds[name] / seconds[first]:.2f}" for name in names]
    return f"{first} {1e3 * seconds[first]:.3g} ms, " + ", ".join(ratios)


def show(benches, found, device):
    """Print summaries, and code for the tables."""
    fields_of, partial = {}, {}
    for bench in benches:
        rows, all_cases = found.of(bench), list(bench.cases(device))
        if all_cases:
            print(f"\n{bench.name}: {len(rows)} of {len(all_cases)} cases", end="")
            print(f", {summary(rows)}" if rows else "")
        if rows and bench.propose:
            fields_of.setdefault(bench.table, {}).update(bench.propose(rows, device))
            if len(rows) < len(all_cases):
                text = f"{len(rows)} of {len(all_cases)} cases of {bench.name}"
                partial.setdefault(bench.table, []).append(text)
    for table, proposed in fields_of.items():
        print(f"\nvmapsafe/rules/{table}.py\n{entry_code(table, device, proposed)}")
        if table in partial:
            print(f"    # TOO FEW TO RELY ON: {', '.join(partial[table])}")


def entry_code(table, device, proposed):
    """The entry of a table, as it is written there."""
    key = f'"{" ".join(processor())}": ' if table == "products" else f"{device}="
    if "" in proposed:
        return f"    {key}{proposed['']},"
    lines = [f"{field}={value}," for field, value in proposed.items()]
    inside = textwrap.indent("\n".join(lines), "    ")
    text = f"{key}Regime(\n{inside}\n),"
    missing = FIELDS.get(table, set()) - {*proposed}
    if missing:
        text += f"  # not measured: {', '.join(sorted(missing))}"
    return textwrap.indent(text, "    ")


if __name__ == "__main__":
    main()
