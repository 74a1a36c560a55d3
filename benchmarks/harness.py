"""What every benchmark shares: taking turns, medians, the machine's description, and the tables of RESULTS.md."""

import ctypes
import gc
import importlib
import importlib.metadata
import json
import mmap
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

SIZES = ("full", "quick", "tiny")
PACKAGES = (
    *(
        "actdb",
        "torch",
        "transformer-lens",
        "numpy",
        "zarr",
        "tensorstore",
        "zarrs",
        "h5py",
        "safetensors",
        "numcodecs",
    ),
    *("duckdb", "pandas", "pyarrow", "pylance", "datasets", "nnsight", "torchlens"),
    *("faiss-cpu", "scikit-learn", "hnswlib", "usearch"),
)


@dataclass(frozen=True)
class Goal:
    """A figure to reach: what it is, what was measured, the bound, whether more is better, and what limits it."""

    name: str
    measured: float
    bound: float
    unit: str = "×"
    at_least: bool = True
    why: str = ""

    @property
    def reached(self) -> bool:
        """Whether the figure is on the right side of the bound."""
        return self.measured >= self.bound if self.at_least else self.measured <= self.bound


@dataclass(frozen=True)
class Table:
    """The result of one claim: rows of text or numbers under a header, what they show, and the goals.

    `plotted` names the column that the picture shows, one bar a row; `made` the size, machine and versions.
    """

    title: str
    note: str
    header: Sequence[str]
    rows: Sequence[Sequence[Any]]
    goals: Sequence[Goal] = field(default=())
    plotted: str | None = None
    made: str = ""

    def markdown(self) -> str:
        """Return the table as Markdown."""
        lines = [f"## {self.title}", "", self.note, "", "| " + " | ".join(self.header) + " |"]
        lines.append("|" + " --- |" * len(self.header))
        lines += ["| " + " | ".join(cell(value) for value in row) + " |" for row in self.rows]
        return "\n".join(lines) + "\n"

    def to_json(self) -> str:
        """Return the table as JSON, for the process that collects the claims."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Table":
        """Return a table from its JSON."""
        value = json.loads(text)
        return cls(**{**value, "goals": [Goal(**goal) for goal in value["goals"]]})


def take_turns(
    candidates: Mapping[str, Callable[[], Any]], *, rounds: int, before: Callable[[], Any] = lambda: None
) -> dict[str, float]:
    """Time candidates in turns, A B C B C A C A B …; returns the median seconds of each. One untimed round comes first.

    Each round begins one candidate later, since some leave work behind (memory given back in the background) that
    slows the next. `before` is called before each turn, outside the time.
    """
    times: dict[str, list[float]] = {name: [] for name in candidates}
    order = list(candidates.items())
    for turn in range(rounds + 1):
        begin = turn % len(order)
        for name, function in order[begin:] + order[:begin]:
            before()
            gc.collect()
            began = time.perf_counter()
            function()
            if turn:
                times[name].append(time.perf_counter() - began)
    return {name: float(np.median(values)) for name, values in times.items()}


def latencies(
    candidates: Mapping[str, Callable[[int], Any]], keys: Sequence[int], *, before: Callable[[], Any] | None = None
) -> dict[str, tuple[float, float]]:
    """Time single calls, candidates in turns key by key; returns the 50th and 95th percentile in microseconds.

    `before` is called before each call, outside the time. Every key is asked twice and the second answer timed, unless
    `before` is given: then each is cold.
    """
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for turn in range(1 if before else 2):
        for key in keys:
            for name, function in candidates.items():
                if before:
                    before()
                began = time.perf_counter()
                function(key)
                if turn or before:
                    times[name].append((time.perf_counter() - began) * 1e6)
    return {name: (float(np.percentile(v, 50)), float(np.percentile(v, 95))) for name, v in times.items()}


def peers(*modules: str) -> dict[str, ModuleType]:
    """Import peers by module name, leaving out those that are not installed."""
    found = {}
    for name in modules:
        try:
            found[name] = importlib.import_module(name)
        except ImportError:
            continue
    return found


def missing(*modules: str) -> str:
    """Return a sentence that names the peers left out, and the command that installs them."""
    absent = sorted(set(modules) - set(peers(*modules)))
    return f" Left out, not installed (pip install actdb[bench]): {', '.join(absent)}." if absent else ""


def evict(folder: Path) -> None:
    """Drop the files below a folder from the page cache, as far as the system follows the advice.

    A page that a process has mapped stays; so the pages that this process maps to read are let go of first.
    """
    for begin, end in mapped_ranges(folder):
        ctypes.CDLL(None, use_errno=True).madvise(
            ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), mmap.MADV_DONTNEED
        )
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def mapped_ranges(folder: Path) -> Iterator[tuple[int, int]]:
    """Yield the addresses from … to at which this process maps files below a folder, to read only."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        addresses, access, _, _, _, *path = line.split(maxsplit=5)
        if path and access[1] == "-" and Path(path[0]).is_relative_to(folder.resolve()):
            begin, end = addresses.split("-")
            yield int(begin, 16), int(end, 16)


def machine() -> str:
    """Describe the machine and the versions that the figures belong to."""
    with open("/proc/cpuinfo") if os.path.exists("/proc/cpuinfo") else open(os.devnull) as file:
        names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    versions = []
    for package in PACKAGES:
        try:
            versions.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            versions.append(f"{package} not installed")
    cpu = names[0] if names else platform.machine()
    when = datetime.now(UTC).date().isoformat()
    return f"{when}; {cpu}, {os.cpu_count()} cores; Python {platform.python_version()}; {', '.join(versions)}."


def note(module_doc: str | None) -> str:
    """Return a module's docstring as one paragraph."""
    return " ".join((module_doc or "").split())


def cell(value: Any) -> str:
    """Return a value as a cell of a table."""
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else str(value)
