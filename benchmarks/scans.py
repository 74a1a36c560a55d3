"""Scanning one head (z), and one layer (resid_post), over all rows, beside other readers of the same values.

The files are those of the slices benchmark, in the page cache; GB/s of values.
"""

from pathlib import Path

import numpy as np

from benchmarks import readers
from benchmarks.harness import Goal, Table, missing, note, take_turns

SCALE = {"full": (800, 7), "quick": (300, 3), "tiny": (12, 1)}  # prompts, rounds
CHUNKS = "a head is 8 MB, half a millisecond: planning takes a third of actdb's time, which does not grow with the data"
LAYER, HEAD = 2, 7


def run(size: str, folder: Path) -> Table:
    """Return GB/s of each reader."""
    n_prompts, rounds = SCALE[size]
    rows, goals = [], []
    for codec in ("raw", "lz4"):
        below = folder / codec
        below.mkdir()
        sites, lengths = readers.make(below, n_prompts, codec)
        for site, head, what in (("z", HEAD, "a head"), ("resid_post", None, "a layer")):
            found = readers.readers(below, site, lengths, codec)
            plane = sites[site][LAYER] if head is None else sites[site][LAYER, head]
            for name, read in found.items():
                assert np.array_equal(read(LAYER, head, slice(None)), plane), name
            medians = take_turns(
                {name: lambda read=read, head=head: read(LAYER, head, slice(None)) for name, read in found.items()},
                rounds=rounds,
            )
            speed = {name: plane.nbytes / 1e9 / t for name, t in medians.items()}
            rows += [(codec, what, name, v) for name, v in speed.items()]
            if codec == "raw":
                goals.append(
                    Goal(f"scan of {what}, raw ÷ memmap", speed["actdb"] / speed["np.memmap"], 0.8, why=CHUNKS)
                )
            elif "tensorstore" in speed:
                goals.append(Goal(f"scan of {what}, lz4 ÷ tensorstore", speed["actdb"] / speed["tensorstore"], 1.0))
    header = ("codec", "scan of", "reader", "GB/s")
    return Table("Scans", note(__doc__) + missing(*readers.PEERS), header, rows, goals, "GB/s")
