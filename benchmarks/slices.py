"""Reading one prompt of one head (z) or one layer (resid_post), beside other readers of the same values.

Heads and layers of GPT-2-small's shape, four layers, in float16 over prompts of 20 to 128 tokens, through the public
`sel(...).numpy()`. zarr-python, zarrs and tensorstore read the very files that actdb wrote; the others a file of their
own, uncompressed. Warm: all in the page cache, readers open. Cold: the files dropped from the page cache before each
call. actdb verifies the checksum of a chunk when it first touches it, before the figures here, which costs the reading
of up to 256 KiB; memmap, h5py and safetensors verify none. A first touch of a map reads megabytes around it here.
"""

from functools import partial
from pathlib import Path

import numpy as np

from benchmarks import readers
from benchmarks.harness import Goal, Table, evict, latencies, missing, note

SCALE = {"full": (600, 300, 40), "quick": (150, 100, 10), "tiny": (12, 4, 2)}  # prompts, warm slices, cold slices
LAYER, HEAD = 2, 7


def run(size: str, folder: Path) -> Table:
    """Return microseconds a slice of each reader, warm and cold."""
    n_prompts, n_warm, n_cold = SCALE[size]
    rows, goals = [], []
    for codec in ("raw", "lz4"):
        below = folder / codec
        below.mkdir()
        sites, lengths = readers.make(below, n_prompts, codec)
        starts = np.cumsum(lengths) - lengths
        keys = np.random.default_rng(1).integers(0, n_prompts, n_warm).tolist()
        for site, head, what in (("z", HEAD, "a prompt of a head"), ("resid_post", None, "a prompt of a layer")):
            found = readers.readers(below, site, lengths, codec)

            ranges = [slice(int(b), int(b + n)) for b, n in zip(starts, lengths, strict=True)]
            plane = sites[site][LAYER] if head is None else sites[site][LAYER, head]
            calls = {n: lambda i, r=r, head=head, ranges=ranges: r(LAYER, head, ranges[i]) for n, r in found.items()}
            for name, call in calls.items():
                assert np.array_equal(call(3), plane[ranges[3]]), name
            warm = latencies(calls, keys)
            cold = latencies(calls, keys[:n_cold], before=partial(evict, below))
            rows += [(codec, what, name, *warm[name], cold[name][0]) for name in found]
            goals.append(
                Goal(f"{what}, {codec}, p50", warm["actdb"][0], 50 if codec == "raw" else 250, "µs", at_least=False)
            )
            if codec == "raw":
                ratio = cold["actdb"][0] / cold["np.memmap"][0]
                goals.append(Goal(f"{what}, raw, cold ÷ memmap's cold", ratio, 1.5, at_least=False))
    header = ("codec", "slice", "reader", "warm p50 µs", "warm p95 µs", "cold p50 µs")
    return Table("Slices", note(__doc__) + missing(*readers.PEERS), header, rows, goals, "warm p50 µs")
