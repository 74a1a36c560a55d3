"""What is written in a database's JSON files: names, sites, runs and commits as frozen dataclasses.

Everything read from a file passes through `from_json`, which checks types and names, so that a hostile database cannot
name a path outside its own folder.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from math import prod
from typing import Any

from crc32c import crc32c

from actdb.errors import DamageError, SettingError

FORMAT_VERSION = 1
"""Version of the storage layout; a database with a higher one is refused."""

RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._=+@-]{0,119}")
SITE_NAME = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*")
STORED_DTYPES = ("float16", "float32", "float64", "uint16", "uint32", "int64")
HEAD_DIMS = ("head", "kv_head")
SEAL = "crc32c"
STATISTICS = ("heads", "neurons", "tokens", "lens")
"""What `--stats` takes."""
N_TOP = 16
"""Highest activations that are kept of each neuron."""


def canonical_json(value: Any) -> str:
    """Return the one JSON text of a value: sorted keys, no spaces, ASCII."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def digest(value: Any) -> str:
    """Return the SHA-256 of a value's canonical JSON, in hexadecimal."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def seal(value: Mapping[str, Any]) -> bytes:
    """Return a JSON file's content: the value with a CRC-32C of its canonical form beside it."""
    assert SEAL not in value, "the seal would replace it"
    return canonical_json({**value, SEAL: crc32c(canonical_json(value).encode())}).encode()


def unseal(text: bytes, path: str) -> dict[str, Any]:
    """Parse a sealed JSON file; raises `DamageError` naming the file where it was altered."""
    try:
        value = json.loads(text)
        intact = value.pop(SEAL) == crc32c(canonical_json(value).encode())
    except (ValueError, AttributeError, KeyError, TypeError, RecursionError) as exc:
        raise DamageError(f"{path} is damaged: not the JSON that was written") from exc
    if not intact:
        raise DamageError(f"{path} does not match its checksum")
    return dict(value)


def check_run_name(name: str) -> str:
    """Return a run name that is safe as a folder name, or raise `SettingError`."""
    if not RUN_NAME.fullmatch(name) or (name.endswith((".", "-")) and name.strip(".-") == ""):
        raise SettingError(
            f"run name {name!r} is not usable: up to 120 letters, digits and . _ = + @ -, the first a letter or digit"
        )
    return name


@dataclass(frozen=True)
class SiteSpec:
    """How one site of a run is stored: a Zarr array whose planes (one layer, one head) run over rows or entries.

    `dims` name the axes: (layer, row, d_model), (layer, head, row, d_head), (layer, head, entry), (row, d_model) or
    (prompt, feature); an added site may have no axis after its rows. `layers` are the model's layer numbers in array
    order. Shards cover all planes of one part along the row or entry axis; chunks hold one plane and a range of rows.
    """

    name: str
    hook: str
    dims: tuple[str, ...]
    shape: tuple[int, ...]
    shard_shape: tuple[int, ...]
    chunk_shape: tuple[int, ...]
    dtype: str
    codec: str
    precision: int | None = None
    layers: tuple[int, ...] = ()

    @property
    def added(self) -> bool:
        """Whether an analysis added it to the run: it was taken from no hook."""
        return not self.hook

    @cached_property
    def axis(self) -> int:
        """The axis along which parts follow one another: row, entry or prompt."""
        return next(i for i, dim in enumerate(self.dims) if dim in ("row", "entry", "prompt"))

    @property
    def capacity(self) -> int:
        """Rows (or entries, or prompts) of a part along `axis`."""
        return self.shard_shape[self.axis]

    @property
    def planes(self) -> tuple[int, ...]:
        """Extents of the axes before `axis`: layers and heads."""
        return self.shape[: self.axis]

    @property
    def feature(self) -> tuple[int, ...]:
        """Extents of the axes after `axis`; () for patterns."""
        return self.shape[self.axis + 1 :]

    @property
    def chunk_grid(self) -> tuple[int, ...]:
        """Chunks of a shard along each axis."""
        return tuple(s // c for s, c in zip(self.shard_shape, self.chunk_shape, strict=True))

    @property
    def n_chunks(self) -> int:
        """Chunks of a shard, absent ones included."""
        return prod(self.chunk_grid)

    def to_json(self) -> dict[str, Any]:
        """Return the JSON form; `from_json` reads it back."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "SiteSpec":
        """Read and check a stored specification; raises `ValueError` on anything malformed."""
        spec = cls(
            name=str(value["name"]),
            hook=str(value["hook"]),
            dims=tuple(map(str, value["dims"])),
            shape=_extents(value["shape"]),
            shard_shape=_extents(value["shard_shape"]),
            chunk_shape=_extents(value["chunk_shape"]),
            dtype=str(value["dtype"]),
            codec=str(value["codec"]),
            precision=None if value.get("precision") is None else int(value["precision"]),
            layers=tuple(int(layer) for layer in value["layers"]),
        )
        ranks = {len(spec.dims), len(spec.shape), len(spec.shard_shape), len(spec.chunk_shape)}
        if not SITE_NAME.fullmatch(spec.name) or spec.dtype not in STORED_DTYPES or len(ranks) != 1:
            raise ValueError(f"malformed site {spec.name!r}")
        if any(c < 1 or s < c or s % c for s, c in zip(spec.shard_shape, spec.chunk_shape, strict=True)):
            raise ValueError(f"malformed chunks of site {spec.name!r}")
        return spec


@dataclass(frozen=True)
class FileRecord:
    """One committed file: its path below the database folder, its size, and a CRC-32C.

    For Parquet files the checksum covers the whole file; for shards it is the one of the chunk index, since each chunk
    carries its own. Together they cover every byte.
    """

    path: str
    stored_bytes: int
    crc32c: int

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "FileRecord":
        """Read and check a stored record."""
        path = str(value["path"])
        if path.startswith(("/", "\\")) or ":" in path or ".." in path.replace("\\", "/").split("/"):
            raise ValueError(f"path {path!r} leaves the database")
        return cls(path, int(value["stored_bytes"]), int(value["crc32c"]))


@dataclass(frozen=True)
class SiteTally:
    """What a part stored of one site: bytes before and after encoding, and the largest rounding error."""

    raw_bytes: int
    stored_bytes: int
    max_abs: float
    max_abs_error: float


@dataclass(frozen=True)
class Commit:
    """One committed part: its files (shards, statistics tables) and what was stored of each site."""

    part: int
    plan_hash: str
    files: tuple[FileRecord, ...]
    sites: Mapping[str, SiteTally]

    def to_json(self) -> dict[str, Any]:
        """Return the JSON form; `from_json` reads it back."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Commit":
        """Read and check a stored commit."""
        return cls(
            part=int(value["part"]),
            plan_hash=str(value["plan_hash"]),
            files=tuple(FileRecord.from_json(record) for record in value["files"]),
            sites={str(k): SiteTally(**v) for k, v in value["sites"].items()},
        )


@dataclass(frozen=True)
class AddedSite:
    """A site that was added to a complete run: its array, and what was written of each part."""

    plan_hash: str
    spec: SiteSpec
    commits: tuple[Commit, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the JSON form; `from_json` reads it back."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "AddedSite":
        """Read and check a stored record; raises `ValueError` on anything malformed."""
        commits = tuple(Commit.from_json(commit) for commit in value["commits"])
        return cls(str(value["plan_hash"]), SiteSpec.from_json(value["spec"]), commits)


@dataclass(frozen=True)
class RunInfo:
    """The content of `run.json`: what was planned, under which configuration, and when.

    `plan` is everything that decides the stored bytes (model configuration, weights, prompts, settings); `plan_hash` is
    its digest. `environment` (device, threads, library versions, time) is recorded beside it and is not part of it.
    """

    name: str
    plan_hash: str
    plan: Mapping[str, Any]
    model: Mapping[str, Any]
    sites: tuple[SiteSpec, ...]
    n_parts: int
    n_prompts: int
    n_rows: int
    n_entries: int
    files: tuple[FileRecord, ...]
    environment: Mapping[str, Any] = field(default_factory=dict)

    @property
    def causal(self) -> bool:
        """Whether attention looks back only, so that patterns are packed lower triangles."""
        return bool(self.plan["causal"])

    def site(self, name: str) -> SiteSpec | None:
        """Return a site's specification, or None."""
        return next((site for site in self.sites if site.name == name), None)

    def to_json(self) -> dict[str, Any]:
        """Return the JSON form; `from_json` reads it back."""
        return {"format_version": FORMAT_VERSION, **asdict(self)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "RunInfo":
        """Read and check a stored run; raises `ValueError` on anything malformed."""
        if not RUN_NAME.fullmatch(str(value["name"])):
            raise ValueError(f"run name {value['name']!r} is not usable")
        return cls(
            name=str(value["name"]),
            plan_hash=str(value["plan_hash"]),
            plan=dict(value["plan"]),
            model=dict(value["model"]),
            sites=tuple(SiteSpec.from_json(site) for site in value["sites"]),
            n_parts=int(value["n_parts"]),
            n_prompts=int(value["n_prompts"]),
            n_rows=int(value["n_rows"]),
            n_entries=int(value["n_entries"]),
            files=tuple(FileRecord.from_json(record) for record in value["files"]),
            environment=dict(value["environment"]),
        )


def _extents(values: Sequence[Any]) -> tuple[int, ...]:
    extents = tuple(int(value) for value in values)
    if any(extent < 0 for extent in extents):
        raise ValueError("negative extent")
    return extents
