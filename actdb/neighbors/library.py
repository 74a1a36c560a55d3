"""The boundary to FAISS: which index to make, its training, search and files; on a GPU where faiss-gpu finds one.

FAISS is imported when it is first needed, and is optional: exact search works without it.
"""

import contextlib
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from actdb.errors import DamageError, SettingError
from actdb.storage.folder import write_error

KINDS = ("flat", "ivf", "hnsw", "ivfpq")
FLAT_ROWS = 50_000
HNSW_LINKS = 32
HNSW_BREADTH = 100
"""How widely a graph looks for the links of a new row. Against FAISS's default of 40, rows 768 wide take 1.6 times as
long to add, and a search needs two thirds of its time for the same recall."""
POINTS_A_LIST = 39
"""Training vectors that FAISS wants for each centroid."""
PQ_ROWS = POINTS_A_LIST * 256
CODE_VALUES = 8
"""Values that one byte of a product-quantised vector stands for."""
LARGEST_EF = 2048
CANDIDATES = {"ivfpq": 8}
"""Candidates for each neighbour asked for: their distances are computed anew from the stored rows."""
GPU_KINDS = ("flat", "ivf")
BUFFER_BYTES = 1024**2
Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Design:
    """What kind of index to make: lists of an inverted file, bytes of a code; 0 where the kind has none."""

    kind: str
    n_lists: int = 0
    code_bytes: int = 0

    def to_json(self) -> dict[str, Any]:
        """Return the JSON form."""
        return asdict(self)

    @property
    def breadths(self) -> list[int]:
        """How widely a search may look, ascending: lists probed, candidates kept in a graph; [] where it is exact."""
        if self.kind == "flat":
            return []
        first, last = (16, LARGEST_EF) if self.kind == "hnsw" else (1, self.n_lists)
        powers = [first << i for i in range((last // first).bit_length())]
        steps = {size for power in powers for size in (power, power * 3 // 2)}  # each half as large again, or less
        return sorted({last, *(size for size in steps if size < last)})


def load_faiss() -> Any:
    """Import FAISS; raises `SettingError` with the command that installs it."""
    try:
        import faiss
    except ImportError as exc:
        raise SettingError(
            "an index needs FAISS: pip install 'actdb[cpu]' or 'actdb[gpu]'; or search without one, with --exact"
            " (exact=True)"
        ) from exc
    return faiss


def make_design(kind: str | None, n_rows: int, width: int) -> Design:
    """Return the design for so many rows: flat up to 50,000, then HNSW, product quantisation where that fills memory.

    Raises `SettingError` for an unknown kind, and for ivfpq of too few rows to train on.
    """
    if kind is not None and kind not in KINDS:
        raise SettingError(f"index kind {kind!r}: choose one of {', '.join(KINDS)}")
    chosen = kind or _choose_kind(n_rows, width)
    if chosen == "ivfpq" and n_rows < PQ_ROWS:
        raise SettingError(
            f"index kind 'ivfpq' needs {PQ_ROWS} rows to train on; there are {n_rows}: choose flat or ivf"
        )
    n_lists = max(1, min(int(4 * n_rows**0.5), int(0.9 * n_rows) // POINTS_A_LIST)) if chosen in ("ivf", "ivfpq") else 0
    code = next(m for m in range(-(-width // CODE_VALUES), width + 1) if width % m == 0) if chosen == "ivfpq" else 0
    return Design(chosen, n_lists, code)


def make_index(design: Design, width: int, metric: str) -> Any:
    """Return an empty FAISS index for prepared rows; among unit vectors, the nearest by cosine are those by l2.

    A graph holds rows as float16: the same recall as with float32 from half the memory, and faster.
    """
    faiss = load_faiss()
    measure = faiss.METRIC_INNER_PRODUCT if metric == "ip" else faiss.METRIC_L2
    if design.kind == "hnsw":
        graph = faiss.IndexHNSWSQ(width, faiss.ScalarQuantizer.QT_fp16, HNSW_LINKS, measure)
        graph.hnsw.efConstruction = HNSW_BREADTH
        return graph
    flat = faiss.IndexFlat(width, measure)
    if design.kind == "flat":
        return _accelerated(flat)
    if design.kind == "ivf":
        index = faiss.IndexIVFFlat(flat, width, design.n_lists, measure)
    else:
        index = faiss.IndexIVFPQ(flat, width, design.n_lists, design.code_bytes, 8, measure)
    flat.this.disown()  # the inverted file owns its quantiser
    index.own_fields = True
    return _accelerated(index) if design.kind in GPU_KINDS else index


def n_training_rows(design: Design, n_rows: int) -> int:
    """Return how many rows to train on."""
    return min(n_rows, max(64 * design.n_lists, 2 * PQ_ROWS if design.code_bytes else 0)) if design.n_lists else 0


def search_index(index: Any, design: Design, queries: Floats, k: int, breadth: int) -> Ints:
    """Return the ids of the `k` nearest [query, k] that an index finds, so widely searched; −1 where it found fewer."""
    faiss = load_faiss()
    options = None
    if design.kind == "hnsw":
        options = faiss.SearchParametersHNSW(efSearch=breadth)
    elif design.kind != "flat":
        options = faiss.SearchParametersIVF(nprobe=breadth)
    _, ids = index.search(np.ascontiguousarray(queries), min(k, int(index.ntotal)), params=options)
    return np.asarray(ids, np.int64)


def write_index(index: Any, path: Path) -> None:
    """Write an index to a file and sync it; raises `SpaceError` or `WriteError`.

    FAISS itself would leave the last buffer unwritten on a full disk without a word.
    """
    faiss = load_faiss()
    plain = faiss.index_gpu_to_cpu(index) if _on_gpu(index) else index
    failures: list[OSError] = []
    try:
        with open(path, "wb", buffering=0) as file:

            def write(block: bytes) -> None:
                try:
                    while block and not failures:
                        block = block[file.write(block) :]
                except OSError as exc:
                    failures.append(exc)  # an exception must not pass through FAISS

            sink = faiss.PyCallbackIOWriter(write)
            buffer = faiss.BufferedIOWriter(sink, BUFFER_BYTES)
            faiss.write_index(plain, buffer)
            del buffer  # which writes what it still holds
            os.fsync(file.fileno())
            for failure in failures:
                raise failure
    except OSError as exc:
        raise write_error(exc, str(path.parent)) from exc


def read_index(path: str, design: Design) -> Any:
    """Read an index from a file; raises `DamageError` where FAISS cannot."""
    faiss = load_faiss()
    try:
        index = faiss.read_index(path)
    except RuntimeError as exc:
        raise DamageError(f"{path} cannot be read as an index: {_reason(exc)}") from exc
    return _accelerated(index) if design.kind in GPU_KINDS else index


def _accelerated(index: Any) -> Any:
    """Return an index on the GPU where faiss-gpu finds one."""
    faiss = load_faiss()
    if not hasattr(faiss, "StandardGpuResources") or faiss.get_num_gpus() == 0:
        return index
    return faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), 0, index)


def _on_gpu(index: Any) -> bool:
    return type(index).__name__.startswith("Gpu")


def _choose_kind(n_rows: int, width: int) -> str:
    if n_rows <= FLAT_ROWS:
        return "flat"
    bytes_needed = n_rows * (2 * width + 8 * HNSW_LINKS + 16)
    memory = 0
    with contextlib.suppress(ValueError, OSError):
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return "hnsw" if bytes_needed <= memory // 2 or n_rows < PQ_ROWS else "ivfpq"


def _reason(exc: BaseException) -> str:
    """Return FAISS's message without the place in its source."""
    return str(exc).strip().splitlines()[-1].rpartition("Error: ")[2][:200] if str(exc).strip() else type(exc).__name__
