"""The weights kept with a run, under TransformerLens' names, so that analyses need no model.

They lie in `weights/<sha256>/`, one safetensors file a layer and one for the rest. The folder is named by the hash of
the weights and lies outside the run, so that runs of one model share it and keep them once.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, cast

import torch
from crc32c import crc32c

from actdb.errors import DamageError
from actdb.harvesting.models import Model
from actdb.schema import FileRecord, seal, unseal
from actdb.storage.folder import Folder
from actdb.unembedding import READOUT_WEIGHTS, UNEMBEDDING, Readout

WEIGHTS = "weights"
TIED = "W_U is the transpose of W_E"


def weight_tensors(model: Model, layers: Sequence[int]) -> dict[str, dict[str, torch.Tensor]]:
    """Return tensors by file name and TransformerLens name: the harvested layers, embeddings, final norm, unembedding.

    Keys and values of grouped-query models are kept once a kv head, [kv_head, d_model, d_head].
    """
    tensors = _named_tensors(model)
    files: dict[str, dict[str, torch.Tensor]] = {"rest": {}}
    n_heads, n_kv = model.config["n_heads"], model.config["n_kv_heads"]
    for name, tensor in tensors.items():
        parts = name.split(".")
        if parts[0] == "blocks" and len(parts) > 2 and parts[1].isdigit():
            if int(parts[1]) not in layers:
                continue
            if parts[-1] in ("W_K", "W_V", "b_K", "b_V") and n_kv and n_heads != n_kv and len(tensor) == n_heads:
                tensor = tensor[:: n_heads // n_kv]
            files.setdefault(f"layer-{int(parts[1]):03d}", {})[name] = tensor
        else:
            files["rest"][name] = tensor
    return {file: held for file, held in files.items() if held}


def write_weights(
    folder: Folder, sha256: str, files: Mapping[str, Mapping[str, torch.Tensor]], *, repair: bool
) -> tuple[FileRecord, ...]:
    """Write the files that are not there yet, bfloat16 widened to float32; returns the records of all.

    Beside each file its record lies as JSON, so that a further run over the same weights neither serialises nor reads
    them; with `repair` every byte is checked, and what is damaged is written again.
    """
    records: list[FileRecord] = []
    for file, tensors in sorted(files.items()):
        name = f"{WEIGHTS}/{sha256}/{file}.safetensors"
        record = _written(folder, name, check=repair)
        if record is None:
            content = _serialise(tensors)
            record = FileRecord(name, len(content), crc32c(content))
            folder.publish(name, content)
            folder.publish(f"{name}.json", seal({"file": asdict(record)}))
        records += (record, folder.record(f"{name}.json"))
    return tuple(records)


def _written(folder: Folder, name: str, *, check: bool) -> FileRecord | None:
    """Return the record of a weights file that is there, or None where it has to be written."""
    try:
        record = FileRecord.from_json(unseal(folder.read_bytes(f"{name}.json"), name)["file"])
        if check:
            folder.check(record)
        intact = folder.path(name).stat().st_size == record.stored_bytes and record.path == name
    except (DamageError, FileNotFoundError, KeyError, TypeError, ValueError):
        return None
    return record if intact else None


def _serialise(tensors: Mapping[str, torch.Tensor]) -> bytes:
    from safetensors.torch import save

    kept, metadata = dict(tensors), {"format": "actdb"}
    if _tied(kept):
        del kept["unembed.W_U"]
        metadata["tied"] = TIED
    return save({key: _plain(value) for key, value in sorted(kept.items())}, metadata)


def output_weights(model: Model, layers: Sequence[int]) -> dict[int, torch.Tensor]:
    """Return W_O [head, d_head, d_model] of each layer whose output weights are known, in float32 on the device."""
    tensors = _named_tensors(model)
    found = {layer: tensors.get(f"blocks.{layer}.attn.W_O") for layer in layers}
    return {
        layer: weight.to(model.device, torch.float32)
        for layer, weight in found.items()
        if weight is not None and weight.ndim == 3
    }


def output_grams(model: Model, layers: Sequence[int]) -> dict[int, torch.Tensor]:
    """Return W_O W_Oᵀ [head, d_head, d_head] of each layer whose output weights are known, in float32."""
    return {layer: weight @ weight.transpose(1, 2) for layer, weight in output_weights(model, layers).items()}


def model_readout(model: Model) -> Readout | None:
    """Return the final norm and unembedding, in float32 on the device; None where the model names no W_U."""
    tensors = _named_tensors(model)
    if UNEMBEDDING not in tensors:
        return None
    weights = {
        name: tensors[name].to(model.device, torch.float32)
        for name in (*READOUT_WEIGHTS, UNEMBEDDING)
        if name in tensors
    }
    return Readout.make(weights, model.config)


def _named_tensors(model: Model) -> dict[str, torch.Tensor]:
    """Return parameters by TransformerLens name where the model tells them, by their own names otherwise."""
    if hasattr(model.module, "tl_named_parameters"):
        return {name: tensor.detach() for name, tensor in cast(Any, model.module).tl_named_parameters()}
    return {name: tensor.detach() for name, tensor in model.module.named_parameters()}


def _tied(tensors: Mapping[str, torch.Tensor]) -> bool:
    embed, unembed = tensors.get("embed.W_E"), tensors.get("unembed.W_U")
    if embed is None or unembed is None or embed.T.shape != unembed.shape:
        return False
    return embed.data_ptr() == unembed.data_ptr() or bool(torch.equal(embed.T, unembed))


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    wide: Any = torch.float32 if tensor.dtype == torch.bfloat16 else tensor.dtype
    return tensor.to("cpu", wide).contiguous().clone()
