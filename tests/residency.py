"""Which pages of a mapped array lie in the page cache."""

import ctypes
import mmap
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from benchmarks.harness import evict


def resident_share(array: npt.NDArray[Any]) -> float:
    """Return the share of the pages of a mapped file's array that are in the page cache."""
    begin = array.ctypes.data // mmap.PAGESIZE * mmap.PAGESIZE
    n_bytes = array.ctypes.data + array.nbytes - begin
    found = (ctypes.c_ubyte * -(-n_bytes // mmap.PAGESIZE))()
    assert ctypes.CDLL(None).mincore(ctypes.c_void_p(begin), ctypes.c_size_t(n_bytes), found) == 0
    return float(np.bitwise_and(np.frombuffer(found, np.uint8), 1).mean())


def need_eviction(folder: Path) -> None:
    """Skip the test where files below a folder do not leave the page cache, as on a tmpfs."""
    (folder / "evicted").mkdir()
    np.save(folder / "evicted" / "x.npy", np.ones(2**20))
    evict(folder / "evicted")
    try:
        share = resident_share(np.load(folder / "evicted" / "x.npy", mmap_mode="r"))
    except AttributeError:
        pytest.skip("this system does not tell which pages are in memory")
    if share > 0.5:
        pytest.skip("this file system keeps its files in memory")
