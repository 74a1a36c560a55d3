"""The TransformerLens-native folder: `config.json` and `model.safetensors`.

It holds a small model built by `TransformerBridge.boot_native`, which has no folder format of its own. The
weights carry the names of `bridge.state_dict()` (`blocks.0.attn.q.weight`). Saving a model twice gives the
same bytes. Loading reads JSON and safetensors only: nothing is unpickled or executed.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import NoneType
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as serialize
from torch import nn
from transformer_lens.config import TransformerBridgeConfig
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.sources.native import NativeModel, boot

from actdb.errors import ModelError

FORMAT = "transformer_lens_native"
CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"

# What NativeModel, its initialisation and its bridge read, with the types in JSON. Device, seed and hook
# flags belong to a process, not to a model.
_COUNT_FIELDS = ("n_layers", "n_ctx", "n_heads", "d_model", "d_head", "d_mlp", "d_vocab", "d_vocab_out")
_FIELD_TYPES: dict[str, tuple[type, ...]] = {
    "model_name": (str,),
    **dict.fromkeys(_COUNT_FIELDS, (int,)),
    "n_key_value_heads": (int, NoneType),
    "attn_only": (bool,),
    "gated_mlp": (bool,),
    "act_fn": (str,),
    "normalization_type": (str, NoneType),
    "final_rms": (bool,),
    "eps": (float, int),
    "attention_dir": (str,),
    "use_attn_scale": (bool,),
    "attn_scale": (float, int),
    "attn_scores_soft_cap": (float, int),
    "output_logits_soft_cap": (float, int),
    "positional_embedding_type": (str,),
    "rotary_dim": (int, NoneType),
    "rotary_base": (int,),
    "rope_scaling": (dict, NoneType),
    "init_mode": (str,),
    "initializer_range": (float, int),
    "dtype": (str,),
}
_DTYPES = {
    str(dtype).removeprefix("torch."): dtype for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)
}


def save_model(module: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Write a model of `TransformerBridge.boot_native` as a TransformerLens-native folder.

    An older model in the folder is replaced; each file appears at once or not at all.

    Raises:
        ModelError: the module is no native bridge, is in compatibility mode or mixes dtypes, or the folder
            holds a model of another format.
    """
    if not isinstance(module, TransformerBridge) or not isinstance(module.original_model, NativeModel):
        raise ModelError(
            f"{type(module).__name__} is not a TransformerLens-native model (TransformerBridge.boot_native); "
            "save a Hugging Face model with its own save_pretrained"
        )
    if getattr(module, "compatibility_mode", False):
        raise ModelError(
            "this model is in compatibility mode, which may have folded its weights; "
            "save it before enable_compatibility_mode"
        )
    folder = Path(folder)
    if (folder / CONFIG_NAME).exists() and not is_native_folder(folder):
        raise ModelError(f"{folder} holds a model of another format; choose another folder")

    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in module.state_dict().items()}
    dtypes = {_dtype_name(tensor.dtype) for tensor in weights.values()}
    if len(dtypes) != 1 or not dtypes <= _DTYPES.keys():
        raise ModelError(f"the weights have dtypes {', '.join(sorted(dtypes))}; one of {', '.join(_DTYPES)} is needed")
    config = {"format": FORMAT, **_config_fields(module.cfg), "dtype": dtypes.pop()}

    folder.mkdir(parents=True, exist_ok=True)
    _replace_file(folder / WEIGHTS_NAME, serialize(weights, metadata={"format": "pt"}))
    _replace_file(folder / CONFIG_NAME, (json.dumps(config, indent=2, allow_nan=False) + "\n").encode())


def is_native_folder(folder: str | os.PathLike[str]) -> bool:
    """Whether the folder's `config.json` bears the mark of the TransformerLens-native format."""
    try:
        config = json.loads((Path(folder) / CONFIG_NAME).read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and config.get("format") == FORMAT


def load_native(
    folder: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
) -> TransformerBridge:
    """Load a folder that `save_model` wrote, in eval mode and without gradients.

    Args:
        folder: The TransformerLens-native folder.
        dtype: What the model computes in; the stored dtype when omitted.
        device: Where the weights go.

    Raises:
        ModelError: a file is missing or malformed, or the weights do not fit the configuration.
    """
    folder = Path(folder)
    bridge = _boot(folder, dtype=dtype, device=device, seed=None)
    weights = _read_weights(folder / WEIGHTS_NAME)
    _check_weights(weights, bridge.state_dict(), path=folder / WEIGHTS_NAME)
    bridge.load_state_dict(weights, strict=True)
    return bridge


def random_native(
    folder: str | os.PathLike[str],
    seed: int,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
) -> TransformerBridge:
    """Build the model that a native folder describes with fresh weights drawn from the seed.

    Only `config.json` is read.

    Raises:
        ModelError: the configuration is missing or malformed.
    """
    return _boot(Path(folder), dtype=dtype, device=device, seed=seed)


def _boot(
    folder: Path, *, dtype: torch.dtype | None, device: str | torch.device, seed: int | None
) -> TransformerBridge:
    """Build the described model; without a seed its weights are arbitrary."""
    fields, stored_dtype = _read_config(folder / CONFIG_NAME)
    dtype = stored_dtype if dtype is None else dtype
    rope_scaling = fields.pop("rope_scaling")
    try:
        config = TransformerBridgeConfig(
            **fields, seed=seed, init_weights=seed is not None, dtype=dtype, device=str(device)
        )
        config.rope_scaling = rope_scaling  # read by NativeModel, but no argument of the constructor
        with torch.random.fork_rng(devices=[]):  # layers draw weights on construction
            bridge = boot(config, device=device, dtype=dtype, model_name=fields["model_name"])
    except (TypeError, ValueError, NotImplementedError, ArithmeticError, AttributeError) as exc:
        raise ModelError(f"{folder / CONFIG_NAME}: no model can be built from it: {exc}") from exc
    bridge.eval()
    bridge.original_model.eval()
    return bridge.requires_grad_(False)


def _config_fields(cfg: TransformerBridgeConfig) -> dict[str, Any]:
    fields = {name: getattr(cfg, name, None) for name in _FIELD_TYPES if name != "dtype"}
    fields["initializer_range"] = float(cfg.initializer_range)  # a NumPy scalar by default
    return fields


def _read_config(path: Path) -> tuple[dict[str, Any], torch.dtype]:
    """The constructor's fields and the stored dtype."""
    try:
        config = json.loads(path.read_bytes())
    except FileNotFoundError as exc:
        raise ModelError(f"{path}: no such file") from exc
    except OSError as exc:
        raise ModelError(f"{path} cannot be read: {exc}") from exc
    except ValueError as exc:
        raise ModelError(f"{path} is not JSON: {exc}") from exc
    if not isinstance(config, dict) or config.pop("format", None) != FORMAT:
        raise ModelError(f'{path} does not describe a TransformerLens-native model ("format": "{FORMAT}")')
    # An unknown field may change what the model computes, so it is no less an error than a missing one.
    _check_names(config.keys(), _FIELD_TYPES.keys(), path=path, kind="field")
    for name, types in _FIELD_TYPES.items():
        if type(config[name]) not in types:
            wanted = " or ".join("null" if kind is NoneType else kind.__name__ for kind in types)
            raise ModelError(f"{path}: {name} is {config[name]!r}, not {wanted}")
    for name in _COUNT_FIELDS:
        if config[name] < 1:
            raise ModelError(f"{path}: {name} is {config[name]}, not positive")
    dtype = config.pop("dtype")
    if dtype not in _DTYPES:
        raise ModelError(f"{path}: dtype {dtype!r} is not one of {', '.join(_DTYPES)}")
    return config, _DTYPES[dtype]


def _read_weights(path: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(path)
    except FileNotFoundError as exc:
        raise ModelError(f"{path}: no such file") from exc
    except OSError as exc:
        raise ModelError(f"{path} cannot be read: {exc}") from exc
    except SafetensorError as exc:
        raise ModelError(f"{path} is not a readable safetensors file: {exc}") from exc


def _check_weights(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor], *, path: Path) -> None:
    _check_names(found.keys(), expected.keys(), path=path, kind="weight")
    wrong = [
        f"{name} is {list(tensor.shape)} instead of {list(expected[name].shape)}"
        for name, tensor in found.items()
        if tensor.shape != expected[name].shape
    ]
    if wrong:
        raise ModelError(f"{path} does not fit its configuration: {_shorten(wrong)}")


def _check_names(found: Any, expected: Any, *, path: Path, kind: str) -> None:
    missing, unexpected = sorted(expected - found), sorted(found - expected)
    if missing:
        raise ModelError(f"{path}: missing {kind} {_shorten(missing)}")
    if unexpected:
        raise ModelError(f"{path}: unexpected {kind} {_shorten(unexpected)}")


def _shorten(items: list[str], limit: int = 5) -> str:
    rest = len(items) - limit
    return ", ".join(items[:limit]) + (f" and {rest} more" if rest > 0 else "")


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _replace_file(path: Path, data: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(data)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
