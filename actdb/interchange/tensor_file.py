"""Tensors by name from a .pt, .safetensors or .npz file; nothing is unpickled.

Tensors stay on disk where the file holds them as they are (safetensors, `torch.save`, uncompressed npz) and are paged
in when used; those of a compressed npz are held in memory.
"""

import pickle
import re
import struct
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from actdb.errors import ActivationsError

SUFFIXES = (".pt", ".pth", ".safetensors", ".npz")
LOCAL_HEADER = struct.Struct("<26xHH")
"""Of a zip member's local header: the lengths of its name and of its extra field, after which the content lies."""


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Return every tensor of a file; raises `ActivationsError` for one that is missing, damaged or holds objects."""
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise ActivationsError(f"{path}: activations are read from {', '.join(SUFFIXES)} files")
    if not path.is_file():
        raise ActivationsError(f"{path}: no such file of activations")
    readers = {".safetensors": _read_safetensors, ".npz": _read_npz}
    tensors = readers.get(suffix, _read_torch)(path)
    if not tensors:
        raise ActivationsError(f"{path} holds no tensors")
    return tensors


def _read_torch(path: Path) -> dict[str, torch.Tensor]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of pickles that torch.save does not make; they are refused
            found = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, LookupError) as exc:
        if isinstance(exc, pickle.UnpicklingError) and ("GLOBAL" in str(exc) or path.read_bytes()[:1] == pickle.PROTO):
            raise _refused(path, str(exc)) from exc
        raise ActivationsError(f"{path} is no file of torch.save, or it is damaged") from exc
    if not isinstance(found, Mapping):
        raise ActivationsError(
            f"{path} holds a {type(found).__name__}, not tensors by hook name; save cache.cache_dict"
        )
    for name, value in found.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            raise ActivationsError(f"{path}: {name!r} is a {type(value).__name__}, not a tensor; save tensors alone")
    return {name: value.detach() for name, value in found.items()}


def _refused(path: Path, message: str) -> ActivationsError:
    named = re.search(r"GLOBAL ([\w.]+)", message)
    what = f" ({named[1]})" if named else ""
    return ActivationsError(
        f"{path} holds pickled objects{what}, which are refused: unpickling runs code. Save the tensors alone: "
        "torch.save(dict(cache.cache_dict), …)"
    )


def _read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # it is no mapping
    except (SafetensorError, OSError) as exc:
        raise ActivationsError(f"{path} is no safetensors file: {exc}") from exc


def _read_npz(path: Path) -> dict[str, torch.Tensor]:
    try:
        with zipfile.ZipFile(path) as file:
            members = [info for info in file.infolist() if info.filename.endswith(".npy")]
            arrays = {info.filename[:-4]: _member(path, file, info) for info in members}
        return {name: torch.from_numpy(array) for name, array in arrays.items()}
    except (zipfile.BadZipFile, OSError, EOFError, TypeError, ValueError) as exc:
        if "Object arrays" in str(exc) or "object_" in str(exc):
            raise _refused(path, str(exc)) from exc
        raise ActivationsError(f"{path} is no npz file of numbers: {exc}") from exc


def _member(path: Path, file: zipfile.ZipFile, info: zipfile.ZipInfo) -> np.ndarray[Any, Any]:
    """Return one array: mapped where it is stored as it is, else decompressed."""
    with file.open(info) as member:
        if info.compress_type != zipfile.ZIP_STORED:
            return np.asarray(np.lib.format.read_array(member, allow_pickle=False))
        version = np.lib.format.read_magic(member)
        readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        if version not in readers:
            raise ValueError(f"{info.filename} has npy version {version}")
        shape, fortran, dtype = readers[version](member)
        within = member.tell()
    if dtype.hasobject:
        raise ValueError("Object arrays cannot be read")
    with open(path, "rb") as raw:
        raw.seek(info.header_offset)
        begin = info.header_offset + LOCAL_HEADER.size + sum(LOCAL_HEADER.unpack(raw.read(LOCAL_HEADER.size)))
    if not np.prod(shape):
        return np.empty(shape, dtype)
    place = {"offset": begin + within, "shape": shape, "order": "F" if fortran else "C"}
    mapped: Any = np.memmap(path, dtype, "c", **place)  # "c": copied when written to, since torch wants it writable
    return np.asarray(mapped)
