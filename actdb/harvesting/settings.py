"""The settings of a harvest, checked: what `actdb.harvest` and the command line take, and what enters the plan."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from actdb.errors import SettingError
from actdb.schema import STATISTICS, check_run_name
from actdb.storage.codecs import CODECS

POSITIONS = ("all", "last")
STORES = ("float16", "float32")
TOP = re.compile(r"topk:([1-9]\d*)")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Everything that decides what a harvest stores, apart from model and prompts; None means the default."""

    run: str | None = None
    step: int | None = None
    sites: tuple[str, ...] | None = None
    layers: tuple[int, ...] | None = None
    positions: str = "all"
    dtype: str | None = None
    store: str | None = None
    codec: str = "lz4"
    precision: int | None = None
    pattern: str = "full"
    stats: tuple[str, ...] | None = None
    bos: bool = True
    max_length: int | None = None
    strict: bool = False
    batch_tokens: int | None = None
    part_tokens: int | None = None
    buffer_mb: int = 128
    worker: tuple[int, int] | None = None
    device: str | None = None
    tokenizer: Any = None
    processing: str = "raw"
    random_init: int | None = None
    hooks_id: str | None = None

    def __post_init__(self) -> None:
        _choose("--positions", self.positions, POSITIONS)
        _choose("--codec", self.codec, CODECS)
        if self.store is not None:
            _choose("--store", self.store, STORES)
        if self.pattern not in ("full", "none") and not TOP.fullmatch(self.pattern):
            raise SettingError(f"--pattern {self.pattern}: choose full, none or topk:N with N from 1")
        for name in self.stats or ():
            _choose("--stats", name, STATISTICS)
        for option, value in (
            ("--max-length", self.max_length),
            ("--batch-tokens", self.batch_tokens),
            ("--buffer-mb", self.buffer_mb),
        ):
            if value is not None and value < 1:
                raise SettingError(f"{option} {value}: must be at least 1")
        if self.worker is not None and not 0 <= self.worker[0] < self.worker[1]:
            raise SettingError(f"--worker {self.worker[0]}/{self.worker[1]}: I counts from 0 and stays below N")
        if self.run is not None:
            check_run_name(self.run)
        if self.step is not None and self.step < 0:
            raise SettingError(f"--step {self.step}: must not be negative")

    @property
    def top(self) -> int | None:
        """The N of `--pattern topk:N`."""
        match = TOP.fullmatch(self.pattern)
        return int(match[1]) if match else None

    def run_name(self, model: str) -> str:
        """Return the run's name: the one given, or the model's with its random seed and step."""
        if self.run is not None:
            return self.run
        short = re.sub(r"[^A-Za-z0-9._=+@-]", "_", model).lstrip("._=+@-") or "model"
        seed = "" if self.random_init is None else f"-random{self.random_init}"
        step = "" if self.step is None else f"-step{self.step}"
        return check_run_name(f"{short[:90]}{seed}{step}")


def parse_sites(sites: str | Sequence[str] | None) -> tuple[str, ...] | None:
    """Return site names from a list or a comma-separated text; "none" means statistics only."""
    if sites is None:
        return None
    names = sites.split(",") if isinstance(sites, str) else list(sites)
    names = [name.strip() for name in names]
    if "" in names:
        raise SettingError(f"--sites {sites!r}: a name is empty; none keeps statistics only")
    return () if names == ["none"] else tuple(dict.fromkeys(names))


def _choose(option: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise SettingError(f"{option} {value}: choose one of {', '.join(choices)}")
