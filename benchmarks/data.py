"""Made-up runs for the benchmarks of storage: values written through actdb's own writers, without a model."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from actdb.harvesting.pipeline import PartWriter, Writers
from actdb.harvesting.plan import chunk_length
from actdb.schema import RunInfo, SiteSpec, digest
from actdb.storage import commits, verify
from actdb.storage.folder import Folder

RUN = "bench"
Values = npt.NDArray[np.float16]


def site_spec(name: str, values_shape: Sequence[int], codec: str) -> SiteSpec:
    """Return a site [layer, (head,) row, feature] of float16 in one part, with the chunks that a harvest would give."""
    *planes, n_rows, width = values_shape
    chunk = chunk_length(width * 2, int(np.prod(planes)), n_rows)
    return SiteSpec(
        name=name,
        hook=name,
        dims=("layer", "head", "row", "d_head") if len(planes) == 2 else ("layer", "row", "d_model"),
        shape=tuple(values_shape),
        shard_shape=(*planes, -(-n_rows // chunk) * chunk, width),
        chunk_shape=(*(1 for _ in planes), chunk, width),
        dtype="float16",
        codec=codec,
        layers=tuple(range(planes[0])),
    )


def claim(
    path: Path, specs: Sequence[SiteSpec], lengths: npt.NDArray[np.int64], statistics: Sequence[str] = ()
) -> tuple[Folder, RunInfo]:
    """Create a database with one run of one part over prompts of the given lengths, prompt after prompt."""
    folder = Folder.create(path)
    entries, n_tokens = lengths * (lengths + 1) // 2, int(lengths.sum())
    prompts = {
        "prompt_id": np.arange(len(lengths), dtype=np.int32),
        "text": pa.nulls(len(lengths), pa.string()),
        "n_tokens": lengths,
        "truncated": np.zeros(len(lengths), np.int32),
        "part": np.zeros(len(lengths), np.int64),
        "row_start": np.cumsum(lengths) - lengths,
        "n_rows": lengths,
        "entry_start": np.cumsum(entries) - entries,
        "n_entries": entries,
    }
    tokens = {
        "prompt_id": np.repeat(prompts["prompt_id"], lengths),
        "pos": (np.arange(n_tokens) - np.repeat(prompts["row_start"], lengths)).astype(np.int32),
        "token_id": np.zeros(n_tokens, np.int32),
        "token": pa.array(["a"] * n_tokens),
    }
    files = []
    for name, table in (("prompts", prompts), ("tokens", tokens)):
        sink = pa.BufferOutputStream()
        pq.write_table(pa.table(table), sink)
        folder.publish(f"runs/{RUN}/{name}.parquet", sink.getvalue().to_pybytes())
        files.append(folder.record(f"runs/{RUN}/{name}.parquet"))
    plan = {"causal": True, "positions": "all", "statistics": list(statistics), "prompt_set": RUN}
    info = RunInfo(RUN, digest(plan), plan, {"model": RUN}, tuple(specs), 1, len(lengths), n_tokens, 0, tuple(files))
    commits.claim_run(folder, info)
    for file, content in verify.metadata_files(info).items():
        folder.publish(file, content)
    return folder, info


def write_run(path: Path, sites: dict[str, Values], lengths: npt.NDArray[np.int64], codec: str) -> None:
    """Write a run with these sites."""
    specs = [site_spec(name, values.shape, codec) for name, values in sites.items()]
    folder, info = claim(path, specs, lengths)
    writers = Writers()
    writer = PartWriter(folder, info, 0, writers, computed_dtype="float16")
    for name, values in sites.items():
        for layer, block in enumerate(values):
            writer.append(name, layer, block)
    writer.finish(dict, replace=False, done=lambda commit: None)
    writers.close()
