"""What the tests harvest: a tiny hooked module, a run written without any model, and harvests to be killed.

Run as a program it forks harvests of the module on demand; see `serve`.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import nn
from transformer_lens.hook_points import HookPoint

import actdb
from actdb.harvesting.pipeline import PartWriter, Writers
from actdb.harvesting.plan import stored_counts
from actdb.schema import RunInfo, SiteSpec, digest
from actdb.storage import commits, verify
from actdb.storage.folder import Folder
from actdb.storage.shards import ShardWriter

PLAN = {"part_tokens": 30, "batch_tokens": 24}
"""Harvests of several small parts."""


class Attention(nn.Module):
    """Attention with fewer key and value heads than query heads."""

    def __init__(self, cfg: SimpleNamespace) -> None:
        super().__init__()
        self.cfg = cfg
        self.W_Q = nn.Parameter(torch.randn(cfg.n_heads, cfg.d_model, cfg.d_head))
        self.W_K = nn.Parameter(torch.randn(cfg.n_key_value_heads, cfg.d_model, cfg.d_head))
        self.W_V = nn.Parameter(torch.randn(cfg.n_key_value_heads, cfg.d_model, cfg.d_head))
        self.W_O = nn.Parameter(torch.randn(cfg.n_heads, cfg.d_head, cfg.d_model) / cfg.d_model)
        self.hook_q, self.hook_k, self.hook_v = HookPoint(), HookPoint(), HookPoint()
        self.hook_pattern, self.hook_z = HookPoint(), HookPoint()

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        q = self.hook_q(torch.einsum("bpd,hde->bphe", x, self.W_Q))
        k = self.hook_k(torch.einsum("bpd,hde->bphe", x, self.W_K))
        v = self.hook_v(torch.einsum("bpd,hde->bphe", x, self.W_V))
        share = self.cfg.n_heads // self.cfg.n_key_value_heads
        k, v = k.repeat_interleave(share, 2), v.repeat_interleave(share, 2)
        scores = torch.einsum("bqhe,bkhe->bhqk", q, k) / self.cfg.d_head**0.5
        if self.cfg.causal:
            n = x.shape[1]
            scores = scores.masked_fill(torch.ones(n, n, dtype=torch.bool).triu(1), -torch.inf)
        elif mask is not None:
            scores = scores.masked_fill(mask[:, None, None] == 0, -torch.inf)
        pattern = self.hook_pattern(scores.softmax(-1))
        z = self.hook_z(torch.einsum("bhqk,bkhe->bqhe", pattern, v))
        return torch.einsum("bqhe,hed->bqd", z, self.W_O)


class Mlp(nn.Module):
    def __init__(self, cfg: SimpleNamespace) -> None:
        super().__init__()
        self.W_in = nn.Parameter(torch.randn(cfg.d_model, cfg.d_mlp) / cfg.d_model)
        self.W_out = nn.Parameter(torch.randn(cfg.d_mlp, cfg.d_model) / cfg.d_mlp)
        self.hook_post = HookPoint()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.hook_post((x @ self.W_in).relu()) @ self.W_out
        return out


class Block(nn.Module):
    def __init__(self, cfg: SimpleNamespace) -> None:
        super().__init__()
        self.attn, self.mlp = Attention(cfg), Mlp(cfg)
        self.hook_resid_post = HookPoint()

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        x = x + self.attn(x, mask)
        out: torch.Tensor = self.hook_resid_post(x + self.mlp(x))
        return out


class TinyModel(nn.Module):
    """A transformer with `embed` (no layers), the default sites, `k`, `v`, and the prompt-level site `hook_pooled`."""

    def __init__(
        self,
        *,
        n_layers: int = 2,
        n_heads: int = 2,
        n_kv_heads: int = 1,
        d_model: int = 8,
        d_vocab: int = 16,
        n_ctx: int = 32,
        causal: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.cfg = SimpleNamespace(
            model_name="tiny",
            n_layers=n_layers,
            n_heads=n_heads,
            n_key_value_heads=n_kv_heads,
            d_model=d_model,
            d_head=d_model // n_heads,
            d_mlp=2 * d_model,
            d_vocab=d_vocab,
            n_ctx=n_ctx,
            causal=causal,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.W_E = nn.Parameter(torch.randn(d_vocab, d_model))
            self.blocks = nn.ModuleList(Block(self.cfg) for _ in range(n_layers))
        self.hook_embed, self.hook_pooled = HookPoint(), HookPoint()

    def forward(self, ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        n = ids.shape[1]
        x = self.hook_embed(self.W_E[ids] + torch.arange(n)[:, None] / self.cfg.n_ctx)
        for block in self.blocks:
            x = block(x, attention_mask)
        self.hook_pooled(x[:, 0])  # position 0: does not depend on padding
        return x @ self.W_E.T


def random_prompts(n: int, *, longest: int = 12, d_vocab: int = 16, seed: int = 0) -> list[dict[str, Any]]:
    """Return prompts of random lengths with a label column `kind` and a number `i`."""
    generator = np.random.default_rng(seed)
    lengths = generator.integers(1, longest + 1, n).tolist()
    return [
        {"tokens": generator.integers(0, d_vocab, length).tolist(), "kind": "ab"[i % 2], "i": i}
        for i, length in enumerate(lengths)
    ]


def files_of(root: Path) -> dict[str, bytes]:
    """Return the content of every file of a database by its path: what must be equal between two harvests.

    The catalog is left out, and of `run.json` the time of the harvest (with the checksum that covers it).
    """
    files = {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}
    for name in [name for name in files if name.endswith("run.json")]:
        value = json.loads(files[name])
        del value["crc32c"], value["environment"]["created_at"]
        files[name] = json.dumps(value, sort_keys=True).encode()
    return {name: content for name, content in files.items() if not name.startswith("catalog.duckdb")}


@dataclass(frozen=True)
class Written:
    """A run written without a model: its plan and, by site, the values of each prompt [plane…, row or entry, …]."""

    info: RunInfo
    lengths: tuple[int, ...]
    values: Mapping[str, list[npt.NDArray[Any]]]


def write_run(
    root: Path,
    *,
    seed: int = 0,
    name: str = "made",
    codec: str = "lz4",
    n_prompts: int = 9,
    n_parts: int = 3,
    longest: int = 7,
    layers: tuple[int, ...] = (0, 2, 5),
    n_heads: int = 2,
    causal: bool = True,
    positions: str = "all",
    committed: Sequence[int] | None = None,
) -> Written:
    """Write a run of random values, lengths, chunk lengths and places, through the same writers as a harvest.

    Sites: `resid_post` (layer, row), `k` (layer, kv_head, row), `pattern` (layer, head, entry), `embed` (row),
    `pooled` (prompt), `pattern_index` (uint16). Only the parts in `committed` are written (None: all).
    """
    generator = np.random.default_rng(seed)
    lengths = generator.integers(1, longest + 1, n_prompts)
    n_rows, n_entries = stored_counts(lengths, causal=causal, positions=positions)
    counts = {"row": n_rows.astype(np.int64), "entry": n_entries, "prompt": np.ones(n_prompts, np.int64)}
    parts = np.sort(generator.integers(0, n_parts, n_prompts))
    parts[-1], order = n_parts - 1, generator.permutation(n_prompts)
    starts = {axis: np.zeros(n_prompts, np.int64) for axis in counts}
    capacity = {}
    for axis, count in counts.items():
        used = [int(count[order[parts == part]].sum()) for part in range(n_parts)]
        capacity[axis] = -(-(max(used) + 1) // 8) * 8
        for part in range(n_parts):
            members = order[parts == part]
            starts[axis][members] = np.cumsum(count[members]) - count[members] + part * capacity[axis]

    def site(name: str, axis: str, planes: dict[str, int], feature: dict[str, int], dtype: str) -> SiteSpec:
        before, after = tuple(planes.values()), tuple(feature.values())
        chunk = int(generator.choice([1, 2, 4, 8]))
        return SiteSpec(
            name=name,
            hook=f"hook_{name}",
            dims=(*planes, axis, *feature),
            shape=(*before, int((starts[axis] + counts[axis]).max()), *after),
            shard_shape=(*before, capacity[axis], *after),
            chunk_shape=(*(1 for _ in before), chunk, *after),
            dtype=dtype,
            codec=codec,
            layers=layers if "layer" in planes else (),
        )

    n_layers = len(layers)
    specs = (
        site("resid_post", "row", {"layer": n_layers}, {"d_model": 3}, "float16"),
        site("k", "row", {"layer": n_layers, "kv_head": n_heads}, {"d_head": 2}, "float32"),
        site("pattern", "entry", {"layer": n_layers, "head": n_heads}, {}, "float16"),
        site("embed", "row", {}, {"d_model": 5}, "float32"),
        site("pooled", "prompt", {}, {"feature": 4}, "float16"),
        site("pattern_index", "row", {"layer": n_layers, "head": n_heads}, {"rank": 2}, "uint16"),
    )
    values = {spec.name: [_random(generator, spec, int(n)) for n in counts[spec.dims[spec.axis]]] for spec in specs}
    where = np.empty(n_prompts, np.int64)
    where[order] = parts
    folder = Folder.create(root)
    table = {
        "prompt_id": np.arange(n_prompts, dtype=np.int32),
        "n_tokens": lengths.astype(np.int32),
        "part": where.astype(np.int32),
        "row_start": starts["row"],
        "n_rows": n_rows,
        "entry_start": starts["entry"],
        "n_entries": n_entries,
    }
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(table), sink)
    folder.publish(f"runs/{name}/prompts.parquet", sink.getvalue().to_pybytes())
    plan = {"causal": causal, "positions": positions, "statistics": [], "seed": seed}
    info = RunInfo(
        name=name,
        plan_hash=digest(plan),
        plan=plan,
        model={"model": "made"},
        sites=specs,
        n_parts=n_parts,
        n_prompts=n_prompts,
        n_rows=int(n_rows.sum()),
        n_entries=int(n_entries.sum()),
        files=(folder.record(f"runs/{name}/prompts.parquet"),),
    )
    assert commits.claim_run(folder, info)
    for path, content in verify.metadata_files(info).items():
        folder.publish(path, content)
    write_parts(folder, info, values, [order[parts == part] for part in range(n_parts)], committed)
    return Written(info, tuple(lengths.tolist()), values)


def write_parts(
    folder: Folder,
    info: RunInfo,
    values: Mapping[str, list[npt.NDArray[Any]]],
    members: Sequence[npt.NDArray[np.int64]],
    committed: Sequence[int] | None = None,
) -> None:
    """Write parts, prompt after prompt as batches of one would."""
    writers = Writers()
    for part in range(len(members)) if committed is None else committed:
        writer = PartWriter(folder, info, part, writers, computed_dtype="float32")
        for prompt in members[part].tolist():
            for spec in info.sites:
                block = values[spec.name][prompt]
                for layer in range(len(spec.layers) or 1):
                    writer.append(spec.name, layer, block[layer] if spec.layers else block)
        writer.finish(dict, replace=False, done=lambda commit: None)
    writers.close()


def _random(generator: np.random.Generator, spec: SiteSpec, n: int) -> npt.NDArray[Any]:
    shape = (*spec.planes, n, *spec.feature)
    if spec.dtype == "uint16":
        return generator.integers(0, 2**16, shape).astype(np.uint16)
    return generator.standard_normal(shape).astype(spec.dtype)


class Server:
    """A process that has everything slow to import loaded, and forks harvests and imports on demand; see `serve`."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def start(self, out: Path, **order: Any) -> int:
        """Start a harvest, or with `path` an import, and return its process id."""
        return self._ask({"out": str(out), **order})

    def wait(self, pid: int) -> int:
        """Return the exit status of a harvest once it has ended."""
        return self._ask({"wait": pid})

    def harvest(self, out: Path, **order: Any) -> int:
        """Harvest and return the exit status."""
        return self.wait(self.start(out, **order))

    def close(self) -> int:
        """End the process and return its exit status."""
        self._process.communicate(timeout=30)
        return self._process.returncode

    def _ask(self, order: dict[str, Any]) -> int:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())


def serve() -> None:
    """Fork a child for each line `{"out": …, "run": …}` on stdin, which harvests and exits; prints its process id.

    With `path` and `prompts` it imports that file instead. A line `{"wait": id}` prints the child's exit status,
    negative after a signal. Everything slow to import is loaded once for hundreds of harvests; since this process runs
    no model and starts no thread, forking it is safe.
    """
    slow = ("actdb.harvesting.execution", "actdb.interchange.importing", "safetensors.torch", "zarr.codecs")
    for name in (*slow, "zarr.storage"):
        import_module(name)
    torch.set_num_threads(1)
    for line in sys.stdin:
        order = json.loads(line)
        if "wait" in order:
            print(os.waitstatus_to_exitcode(os.waitpid(order["wait"], 0)[1]), flush=True)
        elif (child := os.fork()) == 0:
            os._exit(_harvest(order))
        else:
            print(child, flush=True)


def _harvest(order: dict[str, Any]) -> int:
    """Harvest or import as ordered; `kill_at` is the file operation before which the process kills itself."""
    if (kill_at := order.pop("kill_at", None)) is not None:
        _kill_before(kill_at)
    try:
        if "path" in order:
            actdb.import_activations(**order)
        else:
            actdb.harvest(TinyModel(), random_prompts(order.pop("n_prompts", 24)), **{**PLAN, **order})
    except actdb.ActdbError as exc:
        print(f"{type(exc).__name__}: {exc}", file=sys.stderr, flush=True)
        return 1
    return 0


def _kill_before(number: int) -> None:
    """Make the process kill itself before its `number`-th operation that changes what is on disk."""
    seen = 0

    def count(function: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            nonlocal seen
            seen += 1
            if seen > number:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return counted

    for name in ("fsync", "link", "replace", "unlink", "mkdir"):
        setattr(os, name, count(getattr(os, name)))
    ShardWriter._write = count(ShardWriter._write)  # type: ignore[method-assign]


if __name__ == "__main__":
    serve()
