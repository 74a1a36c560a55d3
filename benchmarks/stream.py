"""A shuffled training stream over resid_post of one layer [rows, 768] in float16, batches of 4096 as torch tensors.

Clumping is how many rows of its neighbourhood in storage (64 places to each side) a row finds in its batch, as a
multiple of what a perfect shuffle gives: 1 is perfect, unshuffled rows have some 40. actdb draws whole chunks in
random order into a buffer of 64 MiB and shuffles that. Peers: a DataLoader over a memory map by row and by whole
batches of sorted indices (both perfect), HF Datasets shuffled (perfect), and a buffer in the manner of
dictionary_learning: half of it is refilled from a sequential pass, then drawn from at random. Cold: the files are
dropped from the page cache before each turn, as layers larger than memory are.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

import actdb
from benchmarks import data
from benchmarks.harness import Goal, Table, evict, missing, note, peers, take_turns

SCALE = {"full": (1500, 24, 3), "quick": (400, 6, 2), "tiny": (100, 1, 1)}  # prompts, batches, rounds
IN_MEMORY = "the best peer gathers rows of a map that lies whole in the page cache"
FROM_DISK = "each stream reads the same bytes from the disk; a buffer of whole chunks reads no fewer"
LAYER, SIZE, WIDTH, NEAR = 2, 4096, 768, 64


def run(size: str, folder: Path) -> Table:
    """Return rows/s of each stream over the same number of batches, and the quality of its shuffling."""
    n_prompts, n_batches, rounds = SCALE[size]
    generator = np.random.default_rng(0)
    lengths = generator.integers(100, 129, n_prompts)
    n_rows = int(lengths.sum())
    values = generator.standard_normal((4, n_rows, WIDTH), np.float32).astype(np.float16)
    values[LAYER, :, :2] = numbered(n_rows)
    data.write_run(folder / "lz4.actdb", {"resid_post": values}, lengths, "lz4")
    data.write_run(folder / "raw.actdb", {"resid_post": values}, lengths, "raw")
    np.save(folder / "plain.npy", values[LAYER])
    streams = candidates(folder)
    if size == "tiny":
        streams = {name: lambda make=make: small(make()) for name, make in streams.items()}
    quality = {name: clumping(stream(), n_batches, n_rows) for name, stream in streams.items()}
    turns = {name: lambda s=s: drain(s(), n_batches) for name, s in streams.items()}
    n_taken = n_batches * (64 if size == "tiny" else SIZE)
    warm = {name: n_taken / t for name, t in take_turns(turns, rounds=rounds).items()}
    cold = {name: n_taken / t for name, t in take_turns(turns, rounds=rounds, before=partial(evict, folder)).items()}
    rows = [(name, warm[name], cold[name], quality[name]) for name in turns]
    goals = (
        Goal("shuffled stream ÷ best peer", _lead(warm), 5.0, why=IN_MEMORY),
        Goal("shuffled stream, cold ÷ best peer", _lead(cold), 5.0, why=FROM_DISK),
    )
    header = ("stream", "rows/s", "cold rows/s", "clumping")
    return Table("Shuffled stream", note(__doc__) + missing("datasets"), header, rows, goals, "cold rows/s")


def _lead(speed: Mapping[str, float]) -> float:
    """Return actdb's best speed over the best of all others."""
    own = max(value for name, value in speed.items() if name.startswith("actdb"))
    return own / max(value for name, value in speed.items() if not name.startswith("actdb"))


def numbered(n_rows: int) -> npt.NDArray[np.float16]:
    """Return each row's number in two float16 that hold it exactly."""
    number = np.arange(n_rows)
    return np.stack([number // 2048, number % 2048], axis=1).astype(np.float16)


def candidates(folder: Path) -> dict[str, Callable[[], Iterator[torch.Tensor]]]:
    """Return the streams, each made anew by a call."""
    plain = np.load(folder / "plain.npy", mmap_mode="r")
    sites = {
        codec: actdb.open(folder / f"{codec}.actdb").run()["resid_post"].sel(layer=LAYER) for codec in ("raw", "lz4")
    }
    streams: dict[str, Callable[[], Iterator[torch.Tensor]]] = {
        f"actdb, {codec}": lambda site=site: (torch.from_numpy(b.values) for b in site.shuffled(SIZE, seed=1))
        for codec, site in sites.items()
    }
    streams["DataLoader over memmap, by row"] = lambda: iter(
        torch.utils.data.DataLoader(MappedRows(plain), batch_size=SIZE, shuffle=True)
    )
    streams["DataLoader over memmap, by batch"] = lambda: iter(
        torch.utils.data.DataLoader(
            MappedRows(plain),
            batch_size=None,
            sampler=torch.utils.data.BatchSampler(
                torch.utils.data.RandomSampler(range(len(plain))), SIZE, drop_last=False
            ),
        )
    )
    streams["dictionary_learning-style buffer"] = lambda: buffered(plain)
    found = peers("datasets")
    if "datasets" in found:
        import pyarrow as pa

        found["datasets"].disable_progress_bars()
        table = pa.table({"x": pa.FixedSizeListArray.from_arrays(pa.array(np.array(plain).reshape(-1)), WIDTH)})
        found["datasets"].Dataset(table).save_to_disk(str(folder / "hf"))
        held = found["datasets"].load_from_disk(str(folder / "hf")).with_format("torch")
        streams["HF Datasets, shuffled"] = lambda: (b["x"] for b in held.shuffle(seed=1).iter(SIZE))
    return streams


class MappedRows(torch.utils.data.Dataset[torch.Tensor]):
    """Rows of a memory map, one or many at a time."""

    def __init__(self, rows: Any) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Any) -> torch.Tensor:
        wanted = np.sort(index) if isinstance(index, list) else index
        return torch.from_numpy(np.array(self._rows[wanted]))


def buffered(plain: Any, n_batches: int = 32) -> Iterator[torch.Tensor]:
    """Yield from a buffer of 32 batches, refilled from a sequential pass when half of it is used."""
    capacity, position = min(n_batches * SIZE, len(plain)), 0
    buffer = torch.empty(0, WIDTH, dtype=torch.float16)
    while position < len(plain) or len(buffer):
        take = min(capacity - len(buffer), len(plain) - position)
        buffer = torch.cat([buffer, torch.from_numpy(np.array(plain[position : position + take]))])
        position += take
        order = torch.randperm(len(buffer))
        use = len(buffer) // 2 if position < len(plain) else len(buffer)
        for begin in range(0, use, SIZE):
            yield buffer[order[begin : min(begin + SIZE, use)]]
        buffer = buffer[order[use:]]


def small(stream: Iterator[torch.Tensor]) -> Iterator[torch.Tensor]:
    """Cut batches to 64 rows."""
    return (batch[:64] for batch in stream)


def drain(stream: Iterator[torch.Tensor], n_batches: int) -> int:
    """Take batches; returns their rows."""
    return sum(len(batch) for batch, _ in zip(stream, range(n_batches), strict=False))


def clumping(stream: Iterator[torch.Tensor], n_batches: int, n_rows: int) -> float:
    """Return how many rows within 64 places in storage a row finds in its batch, as a multiple of chance."""
    found, expected = 0.0, 0.0
    for batch, _ in zip(stream, range(n_batches), strict=False):
        number = np.sort(batch[:, 0].numpy().astype(np.int64) * 2048 + batch[:, 1].numpy().astype(np.int64))
        assert len(np.unique(number)) == len(number), "a row came twice"
        assert number.max() < n_rows
        near = np.searchsorted(number, number + NEAR, "right") - np.searchsorted(number, number - NEAR) - 1
        found += float(near.sum())
        expected += len(number) * (len(number) - 1) * 2 * NEAR / n_rows
    return found / expected
