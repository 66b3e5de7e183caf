"""Find what got slower between two saved runs, by ratios to each run's plain gradient.

    python bench/compare.py old.json new.json

It does not time anything. It compares ratios, because on another machine, or on a
busier one, the plain gradient takes another time too. The exit status is 1 if a ratio
of vmapsafe grew by more than the threshold, or if the new run refused what the old run
measured.
"""

from __future__ import annotations

import argparse
import sys

from results import races, read


def changes(old, new, contender="vmapsafe"):
    """[(new ratio / old ratio, key and name, old ratio, new ratio)], worst first.

    Args:
        old: a run, as ``results.read`` gives it.
        new: another run. A row that only one of them measured is left out, unless the
            new run refused it. Then it counts as infinitely slow.
        contender: the names that begin with this are compared.
    """
    before, after = races(old), races(new)
    refused = {
        (*(row[n] for n in ("task", "net", "batch", "precision")), row["contender"])
        for row in new["refused"]
    }
    found = []
    for key, rows in before.items():
        for name, row in rows.items():
            if not name.startswith(contender):
                continue
            was = row["x_plain"]
            if name in after.get(key, {}):
                now = after[key][name]["x_plain"]
            elif (*key, name) in refused:
                now = float("inf")
            else:
                continue
            found.append((now / was, (*key, name), was, now))
    return sorted(found, key=lambda change: -change[0])


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("old")
    parser.add_argument("new")
    parser.add_argument(
        "--threshold", type=float, default=1.15, help="default: %(default)s"
    )
    parser.add_argument(
        "--contender",
        default="vmapsafe",
        help='compare names that begin with this, "" for all (default: %(default)s)',
    )
    asked = parser.parse_args(argv)
    found = changes(read(asked.old), read(asked.new), asked.contender)
    if not found:
        parser.error("the two runs have no row in common")
    slower = [change for change in found if change[0] > asked.threshold]
    for factor, (task, net, batch, precision, name), was, now in slower:
        print(
            f"{factor:5.2f} times slower: {name}, {task}, {net}, batch {batch}, "
            f"{precision}: {was:.2f} -> {now:.2f} x plain"
        )
    faster = sum(change[0] < 1 / asked.threshold for change in found)
    print(
        f"{len(found)} ratios compared, {len(slower)} slower and {faster} faster "
        f"by more than {asked.threshold:g}"
    )
    return bool(slower)


if __name__ == "__main__":
    sys.exit(main())
