"""What every benchmark shares: taking turns, medians, the machine's description, and the tables of RESULTS.md."""

import gc
import importlib.metadata
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np

SIZES = ("full", "quick", "tiny")
PACKAGES = ("actdb", "torch", "transformer-lens", "zarr", "tensorstore", "h5py", "numcodecs", "duckdb", "numpy")


@dataclass(frozen=True)
class Table:
    """The result of one claim: rows of text or numbers under a header, and what they show."""

    title: str
    note: str
    header: Sequence[str]
    rows: Sequence[Sequence[Any]]

    def markdown(self) -> str:
        """Return the table as Markdown."""
        lines = [f"## {self.title}", "", self.note, "", "| " + " | ".join(self.header) + " |"]
        lines.append("|" + " --- |" * len(self.header))
        lines += ["| " + " | ".join(_cell(value) for value in row) + " |" for row in self.rows]
        return "\n".join(lines) + "\n"


def take_turns(candidates: Mapping[str, Callable[[], Any]], *, rounds: int) -> dict[str, float]:
    """Time candidates in turns, A B C A B C …; returns the median seconds of each. One untimed round comes first."""
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for turn in range(rounds + 1):
        for name, function in candidates.items():
            gc.collect()
            began = time.perf_counter()
            function()
            if turn:
                times[name].append(time.perf_counter() - began)
    return {name: float(np.median(values)) for name, values in times.items()}


def latencies(candidates: Mapping[str, Callable[[int], Any]], keys: Sequence[int]) -> dict[str, tuple[float, float]]:
    """Time single calls, candidates in turns key by key; returns the 50th and 95th percentile in microseconds."""
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for turn in range(2):
        for key in keys:
            for name, function in candidates.items():
                began = time.perf_counter()
                function(key)
                if turn:
                    times[name].append((time.perf_counter() - began) * 1e6)
    return {name: (float(np.percentile(v, 50)), float(np.percentile(v, 95))) for name, v in times.items()}


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


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else str(value)
