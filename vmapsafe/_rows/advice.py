"""Notes for errors of whole calls: what to do about memory, and about devices."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from vmapsafe._rows.chunks import ChunkSize, is_out_of_memory
from vmapsafe._rows.samples import Samples
from vmapsafe.quantities.protocol import Quantity
from vmapsafe.quantities.rows import Rows


def advise(
    error: RuntimeError,
    samples: Samples,
    chunk_size: ChunkSize,
    wanted: Mapping[str, Quantity[Any]],
) -> None:
    """Add a note to an error for which it is known what to do; leave others.

    Args:
        error: that a call has met.
        samples: of the call.
        chunk_size: how many run at a time.
        wanted: the quantities.
    """
    if is_out_of_memory(error):
        made = [q for q in wanted.values() if isinstance(q, Rows) and q.out is None]
        note = _on_memory(samples, chunk_size, bool(made))
        error.add_note(f"vmapsafe: {samples.called} ran out of memory. {note}")
    devices = sorted({str(value.device) for value in samples.values.values()})
    known = hasattr(error, "__notes__")  # by the block
    if len(devices) > 1 and not known and re.search(_TWO_DEVICES, str(error)):
        error.add_note(
            f"vmapsafe: the parameters are on {' and '.join(devices)}. A quantity that "
            "puts parameters together needs them on one device. Move the model there, "
            "choose those of one device with params=, or ask for each parameter's own, "
            "as Rows(), Sum() and Norms(per_parameter=True) do."
        )


_TWO_DEVICES = r"same device|not on the expected device"


def _on_memory(samples: Samples, chunk_size: ChunkSize, makes_rows: bool) -> str:
    if chunk_size == "auto":
        do = "A chunk of one sample does not fit: choose fewer parameters with params=."
    elif samples.options.meaning.merges:
        do = (
            'In mode "sync" a chunk is a batch with statistics of its own, so '
            'chunk_size="auto" is refused: pass an int, or a smaller batch.'
        )
    else:
        do = 'Pass chunk_size="auto" to run as many samples at a time as fit.'
    if makes_rows:
        of_each = sum([v.numel() * v.itemsize for v in samples.values.values()])
        do += (
            f" The rows of all samples take {samples.count * of_each:,} bytes in any "
            "case. If that is too much, ask for norms, sums or sketches, which do not "
            "need them."
        )
    return do
