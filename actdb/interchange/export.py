"""Writing a selection for other tools: Parquet, npz, safetensors, or a Hugging Face dataset on disk."""

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from actdb.errors import SettingError
from actdb.interchange.array import write_npz, write_safetensors
from actdb.interchange.prompt_table import PromptTable
from actdb.interchange.record import record_batches, record_schema
from actdb.storage.folder import sync_folder, temporary_path, write_error

if TYPE_CHECKING:
    from actdb.selection.view import Selection

SUFFIXES = {".parquet": "parquet", ".npz": "npz", ".safetensors": "safetensors"}
FORMATS = ("parquet", "npz", "safetensors", "hf")
ARROW_FILE = "data-00000-of-00001.arrow"
DATASET_FILES = {ARROW_FILE, "state.json", "dataset_info.json"}


def export_selection(
    selection: "Selection", path: str | os.PathLike[str], *, format: str | None = None, overwrite: bool = False
) -> Path:
    """Write a selection to a file or folder that appears whole or not at all; see `Selection.export`."""
    final = Path(path)
    chosen = choose_format(final, format)
    _check_target(final, chosen, overwrite=overwrite)
    table = PromptTable.of(selection)
    with _published(final, overwrite=overwrite) as temporary:
        WRITERS[chosen](selection, table, temporary)
    return final


def choose_format(path: Path, format: str | None) -> str:
    """Return the format asked for, or the one that the file's suffix names; raises `SettingError` where they differ."""
    by_suffix = SUFFIXES.get(path.suffix.lower())
    if format is None and by_suffix is None:
        raise SettingError(f"{path}: choose a format, one of {', '.join(FORMATS)}, or a name in {', '.join(SUFFIXES)}")
    if format is not None and format not in FORMATS:
        raise SettingError(f"format {format!r}: choose one of {', '.join(FORMATS)}")
    if format is not None and by_suffix not in (None, format):
        raise SettingError(f"{path}: the name says {by_suffix}, the format is {format}; make them agree")
    return format or str(by_suffix)


def write_parquet(selection: "Selection", table: PromptTable, path: Path) -> None:
    """Write records with a row group a batch; float16 stays float16 (Parquet's FLOAT16)."""
    import pyarrow.parquet as pq

    schema = record_schema(selection, table)
    repeated = [name for name in schema.names if name != "activation"]
    with pq.ParquetWriter(path, schema, compression="zstd", use_dictionary=repeated) as writer:
        for batch in record_batches(selection, table):
            writer.write_batch(batch, row_group_size=max(1, len(batch)))


def write_dataset(selection: "Selection", table: PromptTable, path: Path) -> None:
    """Write records as `datasets.Dataset.save_to_disk` does, without that package: `datasets.load_from_disk` maps it.

    The two JSON files are those of its format; columns and their types are read from the Arrow schema.
    """
    import pyarrow as pa

    path.mkdir()
    with pa.OSFile(str(path / ARROW_FILE), "wb") as file:
        schema = record_schema(selection, table)
        with pa.ipc.new_stream(file, schema) as writer:
            for batch in record_batches(selection, table):
                writer.write_batch(batch)
    state: dict[str, Any] = {
        "_data_files": [{"filename": ARROW_FILE}],
        "_fingerprint": uuid4().hex[:16],
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": None,
    }
    (path / "state.json").write_text(json.dumps(state, indent=2))
    (path / "dataset_info.json").write_text(json.dumps({"description": schema.metadata[b"actdb"].decode()}, indent=2))


WRITERS: dict[str, Callable[["Selection", PromptTable, Path], Any]] = {
    "parquet": write_parquet,
    "npz": write_npz,
    "safetensors": write_safetensors,
    "hf": write_dataset,
}


def _check_target(path: Path, format: str, *, overwrite: bool) -> None:
    """Refuse a path that is taken, unless it may be overwritten and holds what such an export makes."""
    if not os.path.lexists(path):
        return
    if not overwrite:
        raise SettingError(f"{path} exists; give another path, or --overwrite")
    if path.is_dir() != (format == "hf"):
        kind = "folder" if path.is_dir() else "file"
        raise SettingError(f"{path} is a {kind}, and {format} is not written as one; give another path")
    if path.is_dir() and not {entry.name for entry in path.iterdir()} <= DATASET_FILES:
        raise SettingError(f"{path} holds other files than an exported dataset's; it is not overwritten")


@contextmanager
def _published(final: Path, *, overwrite: bool) -> Iterator[Path]:
    """Yield a temporary path that is synced and becomes the file or folder at the end."""
    temporary = temporary_path(final.absolute())
    try:
        yield temporary
        _sync(temporary)
        _rename(temporary, final, overwrite=overwrite)
        sync_folder(final.absolute().parent)
    except OSError as exc:
        raise write_error(exc, str(final)) from exc
    finally:
        _remove(temporary)


def _rename(temporary: Path, final: Path, *, overwrite: bool) -> None:
    """Give what was written its name; without `overwrite` a name taken meanwhile is left alone."""
    if temporary.is_dir():
        old = temporary.with_name(f"{temporary.name}.old")
        if overwrite and final.is_dir():
            os.rename(final, old)
        os.rename(temporary, final)  # fails where a folder with files is
        _remove(old)
    elif overwrite:
        os.replace(temporary, final)
    else:
        try:
            os.link(temporary, final)
        except FileExistsError as exc:
            raise SettingError(f"{final} exists; give another path, or --overwrite") from exc


def _sync(path: Path) -> None:
    for file in [*path.iterdir()] if path.is_dir() else [path]:
        with open(file, "rb") as handle:
            os.fsync(handle.fileno())


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
        return
    with contextlib.suppress(OSError):
        path.unlink()
