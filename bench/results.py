"""Saved runs: read what ``pytest bench`` wrote, and keep the results.

``--results`` adds lines to a file: one for the machine, then one for each measurement,
as they come. ``--benchmark-json`` is the plugin's own form, written at the end. A kept
run has one line per measurement. ``read`` reads all of them, and returns::

    {"machine": {...}, "date": "2026-01-31", "commit": {...},
     "rows": [{"task", "net", "batch", "precision", "contender", "rounds",
               "median", "q1", "q3" (seconds), "x_plain", "peak_bytes", ...,
               "commit" if it differs}],
     "refused": [{"task", "net", "batch", "precision", "contender", "why"}]}
"""

from __future__ import annotations

import json
from pathlib import Path

STATS = ("median", "q1", "q3", "rounds")


def read(path):
    text = Path(path).read_text()
    if text.startswith('{"machine"'):
        return read_lines(text)
    saved = json.loads(text)
    if "benchmarks" not in saved:
        return saved
    return {
        "machine": saved["machine_info"],
        "date": saved["datetime"][:10],
        "commit": saved["commit_info"],
        "rows": [
            {
                **row["extra_info"],
                **row["params"],
                **{name: row["stats"][name] for name in STATS},
            }
            for row in saved["benchmarks"]
        ],
        "refused": saved["refused"],
    }


def read_lines(text):
    """A run made in one or more parts; each part begins with a line for the machine."""
    runs = []
    for line in map(json.loads, text.splitlines()):
        if "machine" in line:
            runs.append({**line, "rows": [], "refused": []})
        else:
            runs[-1]["refused" if "why" in line else "rows"].append(line)
    return joined(runs)


def add_lines(path, lines):
    with Path(path).open("a") as file:
        file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)


def write(path, run):
    """Write one line per row, so that a changed number changes one line."""
    lists = {name: run[name] for name in ("rows", "refused")}
    head = {name: value for name, value in run.items() if name not in lists}
    text = json.dumps(head, indent=1)[:-2]
    for name, rows in lists.items():
        lines = ",\n".join("  " + json.dumps(row, ensure_ascii=False) for row in rows)
        text += f',\n "{name}": [\n{lines}\n ]'
    Path(path).write_text(text + "\n}\n")


KEY = ("task", "net", "batch", "precision", "contender")


def joined(runs):
    """Join several runs to one, so that a long one may be made in parts.

    A later measurement replaces an earlier one. If its commit is not that of the first
    run, its row names it.
    """
    first, *rest = runs
    same = ("device", "device_name", "threads", "torch", "vmapsafe", "allocator")
    for run in rest:
        here, there = run["machine"], first["machine"]
        apart = [n for n in same if (here.get(n) or None) != (there.get(n) or None)]
        if apart:
            raise ValueError(
                f"runs to be joined differ in {', '.join(apart)}: "
                f"{first['machine']}, {run['machine']}. Join runs of one machine."
            )
    kept = {"rows": {}, "refused": {}}
    other = {"rows": "refused", "refused": "rows"}
    for run in runs:
        commit = run["commit"].get("id")
        later = {} if commit == first["commit"].get("id") else {"commit": commit[:10]}
        for kind, rows in kept.items():
            now = {tuple(r[n] for n in KEY): {**later, **r} for r in run[kind]}
            for key in now:  # the latest result counts, measured or refused
                kept[other[kind]].pop(key, None)
            rows.update(now)
    return {**first, **{kind: list(rows.values()) for kind, rows in kept.items()}}


def races(run):
    """{(task, net, batch, precision): {contender: row}}, in the order of the run."""
    found = {}
    for row in run["rows"]:
        key = tuple(row[n] for n in ("task", "net", "batch", "precision"))
        found.setdefault(key, {})[row["contender"]] = row
    return found
