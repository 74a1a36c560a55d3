"""Claiming a run's name: `run.json`, exclusively, and the run's own files beside it."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from actdb.errors import RunError
from actdb.harvesting.harvest import Harvest
from actdb.harvesting.prompts import token_texts
from actdb.harvesting.weights import weight_tensors, write_weights
from actdb.schema import FileRecord, RunInfo, canonical_json
from actdb.storage import commits, verify
from actdb.storage.folder import Folder, write_error


def claim_run(folder: Folder, harvest: Harvest) -> RunInfo:
    """Write the run's own files and claim its name, or check that a run of that name has the same plan."""
    info = harvest.info
    if not folder.exists(f"{commits.RUNS}/{info.name}/run.json"):
        with RunFiles(folder, harvest) as files:
            info = replace(info, files=files.records)
            if commits.claim_run(folder, info):
                files.adopt()
                return info
    existing = commits.read_run(folder, info.name)
    if existing.plan_hash != info.plan_hash:
        raise RunError(
            f"run {info.name!r} exists with another plan ({_differences(existing.plan, info.plan)}); "
            "choose another name with --run"
        )
    bad = {damage.path for damage in verify.check_run_files(folder, existing)}
    if bad:
        with RunFiles(folder, harvest, repair=True) as files:
            files.adopt()
    for damage in verify.check_run_files(folder, existing):
        raise RunError(f"{damage.message}, and was not repaired: it was made with other library versions")
    return existing


class RunFiles:
    """The files of a run outside its parts, written under temporary names until the run's name is claimed."""

    def __init__(self, folder: Folder, harvest: Harvest, *, repair: bool = False) -> None:
        self._folder, self._harvest, self._repair = folder, harvest, repair
        self._tables: dict[str, Path] = {}
        self.records: tuple[FileRecord, ...] = ()

    def __enter__(self) -> "RunFiles":
        import pyarrow.parquet as pq

        from actdb.storage.folder import file_record, temporary_path

        run = self._harvest.info.name
        try:
            for table, content in run_tables(self._harvest).items():
                name = f"{commits.RUNS}/{run}/{table}.parquet"
                path = temporary_path(self._folder.path(name))
                path.parent.mkdir(parents=True, exist_ok=True)
                self._tables[name] = path
                pq.write_table(content, path, compression="zstd")
                self.records += (file_record(path, name),)
            layers = sorted({layer for site in self._harvest.sites for layer in site.layers})
            layers = layers or list(self._harvest.settings.layers or range(self._harvest.model.n_layers))
            tensors = weight_tensors(self._harvest.model, layers)
            sha256 = str(self._harvest.info.plan["weights_sha256"])
            self.records += write_weights(self._folder, sha256, tensors, repair=self._repair)
        except OSError as exc:
            self.__exit__()
            raise write_error(exc, str(self._folder.root)) from exc
        return self

    def adopt(self) -> None:
        """Give the files their names, and write the Zarr metadata."""
        import os

        for name, path in self._tables.items():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
            self._folder.adopt(path, name)
        for name, content in verify.metadata_files(self._harvest.info).items():
            if not self._folder.exists(name) or self._folder.read_bytes(name) != content:
                self._folder.publish(name, content)

    def __exit__(self, *_: object) -> None:
        for path in self._tables.values():
            path.unlink(missing_ok=True)


def run_tables(harvest: Harvest) -> dict[str, Any]:
    """Return the run's `prompts` (with where each prompt is stored) and `tokens` as pyarrow tables."""
    import pyarrow as pa

    layout, prompts, tokens = harvest.layout, harvest.prompts, harvest.tokens
    ids = pa.array(np.arange(len(prompts), dtype=np.int32))
    columns: dict[str, Any] = {"prompt_id": ids, "text": pa.array(prompts.texts, pa.string())}
    if prompts.labels:
        arrays = [pa.array(values) for values in prompts.labels.values()]
        columns["labels"] = pa.StructArray.from_arrays(arrays, names=list(prompts.labels))
    columns |= {
        "n_tokens": pa.array(tokens.lengths.astype(np.int32)),
        "truncated": pa.array(tokens.truncated),
        "part": pa.array(layout.parts),
        "row_start": pa.array(layout.row_starts),
        "n_rows": pa.array(layout.n_rows),
        "entry_start": pa.array(layout.entry_starts),
        "n_entries": pa.array(layout.n_entries),
    }
    texts = token_texts(tokens.ids, harvest.model.tokenizer)
    lengths = tokens.lengths
    token_columns = {
        "prompt_id": np.repeat(np.arange(len(prompts), dtype=np.int32), lengths),
        "pos": (np.arange(len(tokens.ids)) - np.repeat(tokens.starts[:-1], lengths)).astype(np.int32),
        "token_id": tokens.ids,
        "token": pa.array([texts[token] for token in tokens.ids.tolist()], pa.string()),
    }
    return {"prompts": pa.table(columns), "tokens": pa.table(token_columns)}


def _differences(existing: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """Name what differs, compared as JSON: one of the plans was read from a file, where tuples are lists."""
    keys = sorted(k for k in {*existing, *new} if canonical_json(existing.get(k)) != canonical_json(new.get(k)))
    return "different " + ", ".join(keys) if keys else "different plan"
