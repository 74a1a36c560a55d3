"""Scanning one head (z), and one layer (resid_post), over all rows, beside other readers of the same values.

The files are those of the slices benchmark, in the page cache; GB/s of values. A turn reads four heads, or four layers,
one after the other: a single head is 8 MB, for which half a millisecond is enough.
"""

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import readers
from benchmarks.harness import Goal, Table, missing, note, take_turns

SCALE = {"full": (800, 5), "quick": (300, 3), "tiny": (12, 1)}  # prompts, rounds
CHUNKS = "a head is 8 MB, half a millisecond: planning and Python take a share that does not grow with the data"
SCANNED = 4


def run(size: str, folder: Path) -> Table:
    """Return GB/s of each reader."""
    n_prompts, rounds = SCALE[size]
    rows, goals = [], []
    for codec in ("raw", "lz4"):
        below = folder / codec
        below.mkdir()
        sites, lengths = readers.make(below, n_prompts, codec)
        for site, what in (("z", "a head"), ("resid_post", "a layer")):
            found = readers.readers(below, site, lengths, codec)
            n_layers, n_heads = len(sites[site]), sites[site].shape[1] if site == "z" else 1
            places = [(layer, head if site == "z" else None) for layer in range(n_layers) for head in range(n_heads)]
            for (layer, head), (name, read) in itertools.product(places[:: len(places) - 1], found.items()):
                plane = sites[site][layer] if head is None else sites[site][layer, head]
                assert np.array_equal(read(layer, head, slice(None)), plane), name
            medians = take_turns(
                {name: partial(scan, read, places[-SCANNED:]) for name, read in found.items()}, rounds=rounds
            )
            speed = {name: SCANNED * plane.nbytes / 1e9 / t for name, t in medians.items()}
            rows += [(codec, what, name, v) for name, v in speed.items()]
            if codec == "raw":
                goals.append(
                    Goal(f"scan of {what}, raw ÷ memmap", speed["actdb"] / speed["np.memmap"], 0.8, why=CHUNKS)
                )
            elif "tensorstore" in speed:
                goals.append(Goal(f"scan of {what}, lz4 ÷ tensorstore", speed["actdb"] / speed["tensorstore"], 1.0))
    header = ("codec", "scan of", "reader", "GB/s")
    return Table("Scans", note(__doc__) + missing(*readers.PEERS), header, rows, goals, "GB/s")


def scan(read: Callable[..., Any], places: Sequence[tuple[int, int | None]]) -> None:
    """Read all rows at each (layer, head)."""
    for layer, head in places:
        read(layer, head, slice(None))
