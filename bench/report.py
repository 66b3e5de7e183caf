"""Make tables and pictures of a saved run, and a short form of the run to keep.

python bench/report.py run.json --readme README.rst
"""

from __future__ import annotations

import argparse
import re
import textwrap
from collections import Counter
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator
from results import joined, races, read, write

# The colours of Okabe and Ito, which the colour-blind tell apart, and a shape for each.
# Ours stand out by size, not by being first.
STYLES = {
    "plain": ("0.45", "."),
    "floor": ("0.2", "."),
    "loop": ("0.45", "x"),
    "vmapsafe": ("#d55e00", "o"),
    "vmapsafe, fast=False": ("#d55e00", "v"),
    "vmapsafe, out=": ("#d55e00", "s"),
    "vmapsafe, compiled": ("#d55e00", "*"),
    "vmapsafe, CUDA graph": ("#d55e00", "d"),
    "vmapsafe, rows reduced": ("#d55e00", "v"),
    "vmap(grad) in a block": ("#d55e00", "p"),
    "vmap(grad)": ("#0072b2", "D"),
    "vmap(grad), compiled": ("#0072b2", "*"),
    "vmap(grad), CUDA graph": ("#0072b2", "d"),
    "Opacus hooks": ("#009e73", "P"),
    "Opacus functorch": ("#009e73", "X"),
    "Opacus ghost clipping": ("#009e73", "^"),
    "ExpandedWeights": ("#e69f00", "<"),
    "BackPACK": ("#cc79a7", ">"),
    "BackPACK BatchL2Grad": ("#cc79a7", ">"),
    "JAX": ("#56b4e9", "h"),
}
DASHES = {"plain": ":", "floor": "--"}
MAIN = (
    *("vmapsafe", "vmapsafe, out=", "vmapsafe, compiled", "vmapsafe, CUDA graph"),
    *("vmap(grad) in a block", "vmap(grad)", "loop", "vmap(grad), compiled"),
    "vmap(grad), CUDA graph",
    *("Opacus hooks", "ExpandedWeights", "BackPACK", "JAX"),
)
BEGIN = ".. The part down to the next comment is written by bench/report.py."
END = ".. The end of that part."


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "runs", type=Path, nargs="+", help="parts of one run, made on one machine"
    )
    parser.add_argument(
        "--into", type=Path, default=Path(__file__).with_name("results")
    )
    parser.add_argument(
        "--readme", type=Path, help="a file whose part on speed is rewritten"
    )
    parser.add_argument(
        "--command", default="pytest bench", help="the command that made the run"
    )
    asked = parser.parse_args(argv)
    run = joined([read(path) for path in asked.runs])
    run.setdefault("command", asked.command)
    asked.into.mkdir(parents=True, exist_ok=True)
    stem = f"{run['machine']['device']}-{run['date']}"
    write(asked.into / f"{stem}.json", run)
    pictures = {
        name: asked.into / f"{stem}-{name}.png"
        for name, draw in PICTURES.items()
        if draw(run, asked.into / f"{stem}-{name}.png")
    }
    (asked.into / f"{stem}.rst").write_text(report(run, pictures))
    if asked.readme:
        asked.readme.write_text(
            put(asked.readme.read_text(), summary(run, pictures, asked.readme.parent))
        )
    print(*[asked.into / f"{stem}.{end}" for end in ("json", "rst")])
    print(*pictures.values(), sep="\n")


# ----------------------------------------------------------------------------- tables


def report(run, pictures):
    """All tables of a run, as a page."""
    title = f"{run['machine']['device_name']}, {run['date']}"
    parts = [
        f"{title}\n{'=' * len(title)}\n",
        filled(machine_line(run)),
        filled(rates_line(run)),
    ]
    for precision in precisions(run):
        for task, heading, base, about in (
            ("rows", "The B x P tensor", "floor", ROWS_ABOUT),
            ("norms", "Norms", "plain", "Times as multiples of the plain gradient."),
            ("clipped sum", "Clipped sum", "plain", "Times as multiples of ``plain``."),
            *[
                (
                    task,
                    task[0].upper() + task[1:],
                    "plain",
                    "As multiples of ``plain``.",
                )
                for task in quantities(run)
            ],
            ("forward", "Forward", "plain", "Times as multiples of one merged call."),
            (
                *("block", "Block", "plain"),
                "Times as multiples of ``model.eval(); model.train()``.",
            ),
        ):
            nets = usual(run, task, precision)
            if nets:
                heading = f"{heading}, {precision}"
                parts += [f"{heading}\n{'-' * len(heading)}\n", about]
                parts.append(ratios(nets, base))
                if task in quantities(run):
                    parts.append(peaks(nets))
                if task == "rows":
                    parts.append(yardsticks(run, nets, precision))
                    parts.append(peaks(nets))
                    parts.append(by_batch(run, precision))
    for name in pictures:
        parts.append(f".. image:: {pictures[name].name}\n   :alt: {name}")
    parts.append(refusals(run))
    return "\n\n".join(part.strip("\n") for part in parts if part) + "\n"


def summary(run, pictures, root):
    """The part of README.rst: one picture, one table, and how they were measured."""
    picture = pictures["rows"].resolve().relative_to(root.resolve())
    precision = precisions(run)[0]
    nets = usual(run, "rows", precision)
    page = picture.parent / f"{run['machine']['device']}-{run['date']}.rst"
    tasks = dict.fromkeys(r["task"] for r in run["rows"] if r["task"] != "rows")
    others = "".join(f"{task}, " for task in tasks)
    return "\n\n".join(
        [
            f".. image:: {picture.as_posix()}\n   :alt: per-sample gradients, as "
            "multiples of the floor, by network and contender",
            ROWS_ABOUT,
            ratios(nets, "floor", MAIN).strip("\n"),
            filled(
                f"{machine_line(run)} `All tables <{page.as_posix()}>`_: {others}"
                "memory, and why contenders are missing."
            ),
        ]
    )


ROWS_ABOUT = """\
Time for every per-sample gradient of a batch, as a multiple of the floor: the plain
gradient of the summed loss, and writing as many fresh numbers as the result has. The
lowest is bold. A dash means that a contender could not run or refused the network."""


def put(text, part):
    """``text`` with ``part`` between the two comments."""
    if BEGIN not in text or END not in text:
        raise ValueError(
            f"the file has no place for the tables. Write {BEGIN!r} and {END!r} there."
        )
    head, rest = text.split(BEGIN, 1)
    return f"{head}{BEGIN}\n\n{part}\n\n{END}{rest.split(END, 1)[1]}"


def filled(text):
    return textwrap.fill(text, 88, break_long_words=False, break_on_hyphens=False)


def machine_line(run):
    m = run["machine"]
    where = m["device_name"]
    if m["device"] == "cpu":
        where += f", {m['threads']} thread" + "s" * (m["threads"] > 1)
    for name, value in m.get("allocator", {}).items():
        where += f", {name}={value}"
    commit = run["commit"]["id"][:10] + " and changes" * run["commit"]["dirty"]
    others = {row["commit"]: {} for row in run["rows"] if "commit" in row}
    for row in run["rows"]:
        others.get(row.get("commit"), {})[row["task"]] = None
    for other, tasks in others.items():
        commit += f" (some {', '.join(tasks)}: {other})"
    return (
        f"Made by ``{run.get('command', 'pytest bench')}`` on {run['date']}: {where}, "
        f"torch {m['torch']}, Python {m['python']}, commit {commit}. "
        "Contenders took turns, and their answers were first compared with the Python "
        "loop's. The numbers are medians."
    )


def rates_line(run):
    m = run["machine"]
    text = (
        f"This device copies {m['copy_bytes_per_s'] / 1e9:.0f} GB/s, read and written, "
        f"fills kept memory at {m['fill_bytes_per_s'] / 1e9:.0f} GB/s and fresh memory "
        f"at {m['fresh_fill_bytes_per_s'] / 1e9:.1f}, and multiplies float32 matrices "
        f"at {m['matmul_flop_per_s'] / 1e12:.3g} TFLOP/s"
    )
    for name in ("tf32", "bf16"):
        if f"{name}_matmul_flop_per_s" in m:
            text += f", {name} {m[f'{name}_matmul_flop_per_s'] / 1e12:.3g}"
    return text + "."


def precisions(run):
    return list(dict.fromkeys(row["precision"] for row in run["rows"]))


def usual(run, task, precision):
    """{"network, batch": rows}, without networks and batches that only show growth."""
    found = {}
    for (t, net, batch, p), rows in races(run).items():
        # Growth is only measured for rows, after the table's own batch.
        key = net if task == "rows" else (net, batch)
        if (t, p) == (task, precision) and key not in found:
            if not net.startswith("CNN, "):
                found[key] = (f"{net}, {batch}", rows)
    return dict(found.values())


def at_batches(run, precision, least):
    """{network: {batch: rows}} of networks measured at >= ``least`` batch sizes."""
    nets = {}
    for (task, net, batch, p), rows in races(run).items():
        if (task, p) == ("rows", precision):
            nets.setdefault(net, {})[batch] = rows
    return {net: batches for net, batches in nets.items() if len(batches) >= least}


def ratio(rows, name, base):
    if name not in rows or base not in rows:
        return None
    return rows[name]["x_plain"] / rows[base]["x_plain"]


def ratios(nets, base, names=None):
    """Contenders by network, as multiples of ``base``."""
    yardsticks = ("plain", "floor", "floor, reused", "JAX plain")
    there = dict.fromkeys(name for rows in nets.values() for name in rows)
    names = [n for n in names or there if n in there and n not in yardsticks]
    lines = [["network, batch", *names]]
    for net, rows in nets.items():
        found = {name: ratio(rows, name, base) for name in names}
        # A contender that computes another gradient is not compared.
        least = min(
            [f"{r:.2f}" for n, r in found.items() if r and "replaced" not in n],
            default=None,
            key=float,
        )
        cells = ["–" if r is None else f"{r:.2f}" for r in found.values()]
        lines.append([net, *(f"**{c}**" if c == least else c for c in cells)])
    return table(lines)


def quantities(run):
    """The tasks of a run that are about quantities of the rows."""
    others = ("rows", "norms", "clipped sum", "forward", "block")
    return list(
        dict.fromkeys(r["task"] for r in run["rows"] if r["task"] not in others)
    )


def yardsticks(run, nets, precision):
    """Milliseconds of plain and the floors, and a floor from the device's rates."""
    m = run["machine"]
    speed = m.get(f"{precision}_matmul_flop_per_s", m["matmul_flop_per_s"])
    lines = [["network, batch", "plain, ms", "spread", "floor", "floor, reused"]]
    lines[0] += ["JAX plain", "on paper", "GFLOP", "MB of rows"]
    for net, rows in nets.items():
        plain, cells = rows["plain"], [net]
        cells.append(f"{1e3 * plain['median']:.3g}")
        cells.append(f"{(plain['q3'] - plain['q1']) / plain['median']:.0%}")
        for name in ("floor", "floor, reused", "JAX plain"):
            there = name in rows
            cells.append(f"{1e3 * rows[name]['median']:.3g}" if there else "–")
        paper = plain["flop"] / speed + plain["bytes"] / m["fill_bytes_per_s"]
        cells += [f"{1e3 * paper:.3g}", f"{plain['flop'] / 1e9:.3g}"]
        lines.append([*cells, f"{plain['bytes'] / 1e6:.3g}"])
    return (
        "The yardsticks in milliseconds. Spread is the distance between the quartiles. "
        "JAX has its own plain gradient. On paper is the time for the operations at "
        "the rate of matrix products, plus the time to write the rows at the rate of "
        f"kept memory.\n\n{table(lines)}"
    )


def peaks(nets):
    there = dict.fromkeys(
        name for rows in nets.values() for name in rows if "peak_bytes" in rows[name]
    )
    if not there:
        return ""
    lines = [["network, batch", *there]]
    for net, rows in nets.items():
        found = [rows.get(name, {}).get("peak_bytes") for name in there]
        lines.append([net, *("–" if b is None else f"{b / 1e6:.0f}" for b in found)])
    return (
        "Peak memory in MB above what was in use before the call. It includes the "
        f"result. For JAX it is XLA's own count.\n\n{table(lines)}"
    )


def by_batch(run, precision):
    """Time of vmapsafe as a multiple of vmap(grad), by network and batch size."""
    found = at_batches(run, precision, 2)
    if not found:
        return ""
    batches = sorted({batch for sizes in found.values() for batch in sizes})
    lines = [["network", *map(str, batches)]]
    for net, sizes in found.items():
        cells = [ratio(sizes.get(b, {}), "vmapsafe", "vmap(grad)") for b in batches]
        lines.append([net, *("–" if r is None else f"{r:.2f}" for r in cells)])
    return (
        "Time of vmapsafe as a multiple of the time of ``vmap(grad)``, by batch "
        f"size.\n\n{table(lines)}"
    )


def refusals(run):
    """Why contenders are missing: each reason once, with its networks."""
    said = {}
    for row in run["refused"]:
        nets = said.setdefault((row["contender"], row["why"]), {})
        nets[row["net"]] = None
    if not said:
        return ""
    lines = ["Missing, in their own words\n---------------------------\n"]
    for (contender, why), nets in said.items():
        why = why.replace("\\", "").replace("``", "'")
        lines.append(f"* {contender} ({', '.join(nets)}): ``{why}``")
    return "\n".join(lines)


def table(lines):
    """An RST table of rows of cells. The first row is the head."""
    widths = [max(len(cell) for cell in column) for column in zip(*lines)]
    rule = " ".join("=" * width for width in widths)
    body = [
        " ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip()
        for line in lines
    ]
    return "\n".join([rule, body[0], rule, *body[1:], rule]) + "\n"


# --------------------------------------------------------------------------- pictures


def draw_rows(run, path):
    return _dots(run, path, [("rows", "floor")])


def draw_reductions(run, path):
    tasks = [("norms", "plain"), ("clipped sum", "plain")]
    return _dots(run, path, tasks)


def _dots(run, path, tasks):
    """Draw networks down and times across, on a logarithmic axis; 1 is the yardstick.

    Each contender has its own height within a network's band. A line through it spans
    the quartiles of the rounds.
    """
    panels = [
        (task, base, precision, usual(run, task, precision))
        for task, base in tasks
        for precision in precisions(run)
    ]
    panels = [panel for panel in panels if panel[3]]
    if not panels:
        return False
    labels = list(dict.fromkeys(label for *_, nets in panels for label in nets))
    names = [
        name
        for name in STYLES
        if name not in ("plain", "floor")
        and any(name in rows for *_, nets in panels for rows in nets.values())
    ]
    size = (2 + 6 * len(panels), 1.7 + 0.3 * -(-len(names) // 4) + 0.62 * len(labels))
    figure = Figure(size, layout="constrained")
    grid = figure.subplots(1, len(panels), squeeze=False, sharey=len(tasks) > 1)
    for axes, (task, base, precision, nets) in zip(grid[0], panels):
        values = []
        for y, label in enumerate(
            labels
        ):  # all panels have the same, in the same order
            axes.axhspan(y - 0.46, y + 0.46, color="0.955", zorder=0)
            rows = nets.get(label, {})
            here = [name for name in names if ratio(rows, name, base)]
            for k, name in enumerate(here):
                height = y + 0.74 * ((k + 0.5) / len(here) - 0.5)
                values.append(ratio(rows, name, base))
                unit = rows[base]["x_plain"]
                low, high = (rows[name][q] / unit for q in ("x_plain_q1", "x_plain_q3"))
                axes.plot(
                    [low, high], [height] * 2, color=STYLES[name][0], linewidth=1.5
                )
                axes.plot(values[-1], height, **_look(name, 9), linestyle="none")
        axes.axvline(1, color="0.2", linewidth=1, zorder=1)
        axes.set_xscale("log")
        _log_ticks(axes, min(values), max(values))
        axes.set_yticks(range(len(labels)), labels)
        axes.set_ylim(len(labels) - 0.5, -0.5)
        axes.set_xlabel(f"time as a multiple of {WHAT[base]}; logarithmic")
        more = f", {precision}" if len(precisions(run)) > 1 else ""
        axes.set_title(HEADINGS[task] + more)
        for side in ("top", "right", "left"):
            axes.spines[side].set_visible(False)
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="x", color="0.85", linewidth=0.7)
    return _finish(figure, run, path, names)


def _look(name, size):
    colour, marker = STYLES[name]
    thin = marker == "x"
    return {
        "color": colour,
        "marker": marker,
        "markersize": size * (1.3 if name == "vmapsafe" else 1),
        "markeredgecolor": colour if thin else "white",
        "markeredgewidth": 1.8 if thin else 0.6,
        "zorder": 4 if name.startswith("vmapsafe") else 3,
    }


HEADINGS = {
    "rows": "Per-sample gradients: time, left is better",
    "norms": "Per-sample gradient norms",
    "clipped sum": "Sum of clipped per-sample gradients",
}
WHAT = {
    "floor": "the floor (plain gradient + writing the result)",
    "plain": "the plain gradient",
}


def draw_growth(run, path):
    """Draw time and memory against batch size, one column per network."""
    # The table by batch size has the networks with fewer sizes.
    nets = at_batches(run, precisions(run)[0], 5)
    if not nets:
        return False
    figure = Figure((1 + 4.4 * len(nets), 8.4), layout="constrained")
    grid = figure.subplots(2, len(nets), squeeze=False)
    for column, (net, batches) in zip(grid.T, nets.items()):
        for axes, value in (
            (column[0], lambda row: 1e3 * row["median"] / row["batch"]),
            (column[1], lambda row: row.get("peak_bytes", 0) / 1e6),
        ):
            _lines(axes, batches, value)
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            axes.set_xticks(sorted(batches), [str(b) for b in sorted(batches)])
            axes.xaxis.set_minor_locator(NullLocator())
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
            axes.yaxis.set_minor_locator(NullLocator())
            axes.set_xlabel("batch size")
            axes.grid(color="0.9", linewidth=0.7)
        column[0].set_title(net)
    grid[0, 0].set_ylabel("milliseconds per sample, logarithmic")
    grid[1, 0].set_ylabel("peak memory, MB, logarithmic")
    return _finish(figure, run, path, _drawn(nets.values()))


def draw_shapes(run, path):
    """Draw ratios to the floor against width and against depth."""
    precision = precisions(run)[0]
    grown = {}
    for (task, net, batch, p), rows in races(run).items():
        named = re.fullmatch(r"CNN, (\d+) (wide|deep)", net)
        if named and (task, p) == ("rows", precision):
            grown.setdefault(named[2], {})[int(named[1])] = rows
    if not grown:
        return False
    figure = Figure((1 + 5 * len(grown), 5), layout="constrained")
    for axes, (kind, sizes) in zip(
        figure.subplots(1, len(grown), squeeze=False)[0], grown.items()
    ):
        relative = {
            size: {name: {"ratio": ratio(rows, name, "floor")} for name in rows}
            for size, rows in sizes.items()
        }
        _lines(axes, relative, lambda row: row["ratio"])
        axes.set_xscale("log", base=2)
        axes.set_xticks(sorted(sizes), [str(s) for s in sorted(sizes)])
        axes.set_ylim(bottom=0)
        axes.set_xlabel("channels" if kind == "wide" else "layers")
        axes.set_ylabel("time as a multiple of the floor")
        axes.grid(color="0.9", linewidth=0.7)
        of = "4 layers" if kind == "wide" else "32 channels"
        batch = next(row["batch"] for rows in sizes.values() for row in rows.values())
        axes.set_title(f"a chain of convolutions with {of}, batch {batch}")
    return _finish(figure, run, path, _drawn(grown.values()))


def _drawn(panels):
    """Contenders measured at more than one size; a panel is {size: rows}."""
    counts = Counter(
        name for sizes in panels for rows in sizes.values() for name in rows
    )
    return [name for name in STYLES if counts[name] > len(panels)]


def _lines(axes, sizes, value):
    """Draw one line per contender; ``sizes`` is {size: {contender: row}}."""
    for name in _drawn([sizes]):
        points = [(s, value(rows[name])) for s, rows in sizes.items() if name in rows]
        points = sorted((s, v) for s, v in points if v)
        if points:
            axes.plot(
                *zip(*points),
                **_look(name, 6),
                linewidth=2.4 if name == "vmapsafe" else 1.2,
                linestyle=DASHES.get(name, "-"),
            )


def _finish(figure, run, path, names):
    """Write the key below and the machine above, and save."""
    handles = [
        Line2D([], [], **_look(n, 9), linestyle=DASHES.get(n, "none"), label=n)
        for n in names
    ]
    columns = max(2, int(figure.get_figwidth() / 2.2))
    figure.legend(
        handles=handles, loc="outside lower center", ncols=columns, frameon=False
    )
    _credit(figure, run)
    figure.savefig(path, dpi=110)
    return True


def _log_ticks(axes, low, high):
    low, high = min(low / 1.15, 0.85), max(high * 1.15, 2.3)
    ticks = (0.1, 0.2, 0.3, 0.5, 0.7, 1, 1.5, 2, 3, 4, 5, 7, 10, 15, 20, 30, 50)
    ticks = [t for t in ticks if low < t < high]
    if len(ticks) > 9:
        ticks = [t for t in ticks if t not in (0.3, 0.7, 1.5, 4, 7, 15)]
    axes.set_xlim(low, high)
    axes.set_xticks(ticks, [f"{t:g}" for t in ticks])
    axes.xaxis.set_minor_locator(NullLocator())


def _credit(figure, run):
    m = run["machine"]
    figure.suptitle(
        f"{m['device_name']}, torch {m['torch']}, {run['date']}",
        fontsize=9,
        color="0.4",
    )


PICTURES = {
    "rows": draw_rows,
    "reductions": draw_reductions,
    "growth": draw_growth,
    "shapes": draw_shapes,
}


if __name__ == "__main__":
    main()
