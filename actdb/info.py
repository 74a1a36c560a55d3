"""What the command line says about a database: a row a run, and files of slices."""

import contextlib
import io
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from actdb.errors import DamageError, SettingError
from actdb.neighbors.index import list_records
from actdb.storage import commits
from actdb.storage.folder import temporary_path, write_error

if TYPE_CHECKING:
    from actdb.database import Database
    from actdb.selection.view import Selection

SUFFIXES = (".npy", ".npz", ".safetensors")


def run_rows(db: "Database") -> tuple[list[str], list[tuple[Any, ...]]]:
    """Return the columns and one row a run: model, status, sizes, bytes before and after encoding, indexes."""
    columns = ["run", "model", "step", "status", "prompts", "tokens", "layers", "sites", "raw_bytes", "stored_bytes"]
    columns.append("indexes")
    rows: list[tuple[Any, ...]] = []
    for run in db.runs():
        info, parts = run.info, db.snapshot.runs[run.name].parts
        raw = stored = 0
        held = [commit for site in db.snapshot.runs[run.name].added.values() for commit in site.commits]
        for part in parts:
            with contextlib.suppress(DamageError):  # `actdb verify` names it
                held.append(commits.read_commit(db.snapshot.folder, run.name, part))
        for commit in held:
            raw += sum(tally.raw_bytes for tally in commit.sites.values())
            stored += sum(record.stored_bytes for record in commit.files)
        status = run.status if run.status == "complete" else f"partial ({len(parts)} of {info.n_parts} parts)"
        sites = ",".join(run.sites) or "statistics only"
        records = [record for _, record in list_records(db.snapshot.folder, run.name)]
        indexes = "; ".join(str(record) for record in records if not isinstance(record, DamageError)) or None
        rows.append(
            (run.name, info.model["model"], run.step, status, info.n_prompts, info.plan.get("n_tokens"),
             len(run.layers), sites, raw, stored, indexes)
        )  # fmt: skip
    return columns, rows


def save_selection(selection: "Selection", output: Path, *, pad: bool) -> str:
    """Write a selection with the prompt and position of each row where the format has room; returns what was written.

    `.npy` holds the values alone, `.npz` and `.safetensors` also `prompt` and `pos`; patterns of several prompts become
    arrays named by prompt id.
    """
    suffix = output.suffix.lower()
    if suffix not in SUFFIXES:
        raise SettingError(f"{output}: choose a name that ends in {', '.join(SUFFIXES)}")
    values = selection.numpy(pad=pad)
    if isinstance(values, list) and suffix == ".npy":
        raise SettingError(f"{output}: patterns of several prompts differ in shape; use --pad, .npz or .safetensors")
    content = io.BytesIO()
    arrays = _arrays(selection, values)
    if suffix == ".npy":
        np.save(content, np.asarray(values))
    elif suffix == ".npz":
        np.savez(content, **arrays)  # type: ignore[arg-type]
    else:
        from safetensors.numpy import save

        content.write(save({name: np.ascontiguousarray(array) for name, array in arrays.items()}))
    path = temporary_path(output)
    try:
        path.write_bytes(content.getbuffer())
        os.replace(path, output)
    except OSError as exc:
        path.unlink(missing_ok=True)
        raise write_error(exc, str(output)) from exc
    shape = f"{len(values)} patterns" if isinstance(values, list) else str(list(values.shape))
    return f"{shape} {selection.dtype}"


def preview(values: Any) -> str:
    """Return the corners of an array as text; of several patterns the first."""
    first = values[0] if isinstance(values, list) and values else values
    with np.printoptions(threshold=60, edgeitems=3, precision=4, suppress=True, linewidth=100):
        return str(first)


def _arrays(selection: "Selection", values: Any) -> dict[str, np.ndarray[Any, Any]]:
    if isinstance(values, list):
        return {f"prompt_{prompt}": value for prompt, value in zip(selection.prompt.tolist(), values, strict=True)}
    arrays = {"values": np.asarray(values), "prompt": selection.prompt}
    if "row" in selection.dims:
        arrays["pos"] = selection.pos
    return arrays
