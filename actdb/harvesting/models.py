"""Models: loaded from a name, a folder or a hooked module into one interface that the harvest uses.

Nothing is unpickled and no remote code is run: weights come from safetensors, configurations from JSON.
"""

import hashlib
import inspect
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from transformer_lens.hook_points import HookPoint

from actdb.errors import ModelError, SettingError
from actdb.harvesting import native

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
PROCESSINGS = ("raw", "folded")
FOLDINGS = ("fold_ln", "center_writing_weights", "center_unembed")
OFFLINE_CONFIGS: dict[str, dict[str, int]] = {
    "gpt2": {},
    "gpt2-medium": {"n_embd": 1024, "n_layer": 24, "n_head": 16},
    "gpt2-large": {"n_embd": 1280, "n_layer": 36, "n_head": 20},
    "gpt2-xl": {"n_embd": 1600, "n_layer": 48, "n_head": 25},
}
"""GPT-2's published shapes, so that `--random-init` needs no network for them; the rest is GPT2Config's default."""

HUB_TIMEOUT_S = 5
LOADING_ERRORS = (
    OSError,
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    ImportError,
    RuntimeError,  # with NotImplementedError
    SafetensorError,
)
"""What transformers and transformer-lens raise for files that they cannot use."""

TOKENIZER_PROBES = ("Once upon a time", " leading space", "two\nlines, 3.5 numbers!", "naïve Ünïcode – “quotes”")


@dataclass(frozen=True)
class Model:
    """A model ready to harvest.

    `hook_points` maps hook names (aliases too) to HookPoints; `config` holds the columns of the table `models`;
    `processing` says what was done to the weights. `call` runs ids [batch, pos] with a mask of the same shape, or None.
    """

    module: torch.nn.Module
    name: str
    config: Mapping[str, Any]
    tokenizer: Any
    hook_points: Mapping[str, HookPoint]
    call: Callable[[torch.Tensor, torch.Tensor | None], Any]
    takes_mask: bool
    device: torch.device
    dtype: str
    processing: Mapping[str, Any] = field(default_factory=dict)

    @property
    def n_layers(self) -> int:
        """Layers of the model."""
        return int(self.config["n_layers"] or 0)


def load_model(
    source: str | os.PathLike[str] | torch.nn.Module,
    *,
    tokenizer: Any = None,
    dtype: str = "float32",
    device: str | None = None,
    random_init: int | None = None,
    processing: str = "raw",
) -> Model:
    """Load a model by name, from a folder, or take a hooked module as it is.

    Raises `ModelError` for a model that does not exist, cannot be reached or is of an unsupported kind, and
    `SettingError` for settings that do not fit it.
    """
    if dtype not in DTYPES:
        raise SettingError(f"--dtype {dtype}: choose one of {', '.join(DTYPES)}")
    if processing not in PROCESSINGS:
        raise SettingError(f"--processing {processing}: choose one of {', '.join(PROCESSINGS)}")
    place = _device(device)
    if isinstance(source, torch.nn.Module):
        if random_init is not None:
            raise SettingError("--random-init needs a model name or folder, not a module")
        return _from_module(source, tokenizer=load_tokenizer(tokenizer), processing=processing)
    folder = Path(source)
    if native.is_native_folder(folder):
        bridge: torch.nn.Module = (
            native.load_native(folder, dtype=DTYPES[dtype], device=place)
            if random_init is None
            else native.random_native(folder, random_init, dtype=DTYPES[dtype], device=place)
        )
        found, name = load_tokenizer(tokenizer), folder.resolve().name
    else:
        with torch.random.fork_rng(devices=[]):  # building layers draws numbers; the caller's are left alone
            bridge, found, name = _from_transformers(
                str(source), tokenizer=tokenizer, dtype=DTYPES[dtype], device=place, random_init=random_init
            )
    return _from_module(bridge, tokenizer=found, processing=processing, name=name)


def load_tokenizer(source: Any, *, model_type: str | None = None) -> Any:
    """Load a tokenizer by name or folder, or pass one through; None where there is none or it is unusable.

    A vocabulary of special tokens alone, which transformers invents for folders without tokenizer files, counts as
    none. A SentencePiece file is checked against SentencePiece itself: some of transformers' loaders drop its leading
    space.
    """
    if source is None or not isinstance(source, str | os.PathLike):
        return source
    import transformers

    folder = Path(source)
    local = folder.is_dir()
    if not local and (os.sep in str(source) and not _looks_like_hub_name(str(source))):
        raise ModelError(f"--tokenizer {source}: no such folder")
    options = {"local_files_only": local or not _hub_answers(), "trust_remote_code": False}
    try:
        if local and (folder / "tokenizer.model").is_file() and not (folder / "tokenizer.json").is_file():
            found = _sentencepiece_tokenizer(folder, options)
        else:
            found = transformers.AutoTokenizer.from_pretrained(str(source), **options)
    except (ModelError, *LOADING_ERRORS) as exc:
        if model_type is not None:
            return None
        raise ModelError(f"cannot load tokenizer {source}: {_first_line(exc)}") from exc
    if not _is_usable(found):
        if model_type is None:
            raise ModelError(f"{source} holds no tokenizer with tokens of its own")
        return None
    return found


def _is_usable(tokenizer: Any) -> bool:
    """Whether a tokenizer has tokens besides the special ones."""
    return len(tokenizer) > max(1, len(set(getattr(tokenizer, "all_special_ids", ()))))


def weights_sha256(model: Model) -> str:
    """Return the SHA-256 over names, shapes, dtypes and bytes of all parameters and buffers, in name order."""
    content = hashlib.sha256()
    tensors = {**dict(model.module.named_parameters()), **dict(model.module.named_buffers())}
    for name in sorted(tensors):
        tensor = tensors[name].detach().to("cpu").contiguous()
        content.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        content.update(tensor.flatten().view(torch.uint8).numpy().data)
    content.update(repr(sorted(model.processing.items())).encode())
    return content.hexdigest()


def _from_module(module: torch.nn.Module, *, tokenizer: Any, processing: str, name: str | None = None) -> Model:
    cfg = getattr(module, "cfg", None)
    points = hook_points(module)
    if cfg is None or not points:
        raise ModelError(
            f"{type(module).__name__} is no hooked module: it needs TransformerLens HookPoints and a `cfg`"
        )
    flags = _process(module, processing)
    call, takes_mask = _caller(module)
    parameter = next(iter(module.parameters()), torch.zeros(()))
    dtype = next((key for key, value in DTYPES.items() if value == parameter.dtype), str(parameter.dtype)[6:])
    own_tokenizer = tokenizer if tokenizer is not None else getattr(module, "tokenizer", None)
    short = name or str(getattr(cfg, "model_name", None) or type(module).__name__)
    return Model(
        module=module,
        name=short.rstrip("/").rsplit("/", 1)[-1],
        config=_config(cfg, short, module),
        tokenizer=own_tokenizer if own_tokenizer is not None and _is_usable(own_tokenizer) else None,
        hook_points=points,
        call=call,
        takes_mask=takes_mask,
        device=parameter.device,
        dtype=dtype,
        processing=flags,
    )


def hook_points(module: torch.nn.Module) -> dict[str, HookPoint]:
    """Return a module's hook points by name: its own registry where it has one, else those found in it."""
    registry = getattr(module, "hook_dict", None)
    if isinstance(registry, Mapping) and registry:
        return dict(registry)
    return {name: part for name, part in module.named_modules() if isinstance(part, HookPoint)}


@contextmanager
def evaluating(module: torch.nn.Module) -> Iterator[None]:
    """Keep dropout out while the context is open; what was in training mode is so again afterwards."""
    roots = (module, getattr(module, "original_model", module))
    training = [part for root in roots for part in root.modules() if part.training]
    for part in training:
        part.training = False
    try:
        yield
    finally:
        for part in training:
            part.training = True


def _process(module: torch.nn.Module, processing: str) -> dict[str, Any]:
    """Fold the weights as the old HookedTransformer did where asked, and say which flags hold."""
    folded = bool(getattr(module, "compatibility_mode", False))
    if processing == "folded" and not hasattr(module, "enable_compatibility_mode"):
        raise SettingError(f"--processing folded: {type(module).__name__} has no enable_compatibility_mode")
    if processing == "folded" and not folded:
        try:
            cast(Any, module).enable_compatibility_mode(disable_warnings=True)
        except LOADING_ERRORS as exc:
            raise ModelError(
                f"this model's weights cannot be folded: {_first_line(exc)}; use --processing raw"
            ) from exc
        folded = True
    flags = _folding(module) if folded else dict.fromkeys(FOLDINGS, False)
    return {"processing": "folded" if any(flags.values()) else "raw", **flags}


def _folding(module: torch.nn.Module) -> dict[str, bool]:
    """Measure what was done to the weights of a module in compatibility mode, which keeps no record of it."""
    tensors = {name: tensor.detach() for name, tensor in cast(Any, module).tl_named_parameters()}
    norms = [tensor for name, tensor in tensors.items() if re.search(r"(^|\.)ln\w*\.w$", name)]
    writing = [tensor for name, tensor in tensors.items() if name.endswith((".W_O", ".W_out"))]
    unembed = [tensor for name, tensor in tensors.items() if name == "unembed.W_U"]
    constant = [bool((norm == norm.flatten()[0]).all()) for norm in norms]
    folded = (constant, [_is_centred(weight) for weight in writing], [_is_centred(weight) for weight in unembed])
    return {flag: bool(found) and all(found) for flag, found in zip(FOLDINGS, folded, strict=True)}


def _is_centred(weight: torch.Tensor) -> bool:
    """Whether the means over the last axis are zero, but for rounding."""
    rounding = 4 * torch.finfo(weight.dtype).eps * float(weight.abs().max())
    return float(weight.mean(-1, dtype=torch.float32).abs().max()) <= rounding


def _caller(module: torch.nn.Module) -> tuple[Callable[[torch.Tensor, torch.Tensor | None], Any], bool]:
    """Return how to run a module, and whether it takes an attention mask.

    A bridge is entered at its original model: the bridge's own forward adds tokenisation and return types that a
    harvest does not need. Its hook points fire the same.
    """
    inner = getattr(module, "original_model", module)
    parameters = inspect.signature(inner.forward).parameters
    keywords = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    takes_mask = "attention_mask" in parameters or (keywords and inner is not module)
    options: dict[str, Any] = {"use_cache": False} if "use_cache" in parameters else {}

    def call(ids: torch.Tensor, mask: torch.Tensor | None) -> Any:
        if takes_mask and mask is not None:
            return inner(ids, attention_mask=mask, **options)
        return inner(ids, **options)

    return call, takes_mask


def _config(cfg: Any, name: str, module: torch.nn.Module) -> dict[str, Any]:
    def number(*keys: str) -> int | None:
        for key in keys:
            value = getattr(cfg, key, None)
            if isinstance(value, int) and not isinstance(value, bool):
                return value
        return None

    n_heads = number("n_heads")
    attn_only = bool(getattr(cfg, "attn_only", False))
    return {
        "model": name.rstrip("/").rsplit("/", 1)[-1],
        "architecture": str(getattr(cfg, "architecture", None) or type(module).__name__),
        "n_layers": number("n_layers"),
        "n_heads": n_heads,
        "n_kv_heads": number("n_key_value_heads") or n_heads,
        "d_model": number("d_model"),
        "d_head": number("d_head"),
        "d_mlp": None if attn_only else number("d_mlp"),
        "d_vocab": number("d_vocab"),
        "n_ctx": number("n_ctx"),
        "norm_eps": _float(getattr(cfg, "eps", None)),
        "normalization": str(getattr(cfg, "normalization_type", None)),
    }


def _float(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _from_transformers(
    source: str, *, tokenizer: Any, dtype: torch.dtype, device: torch.device, random_init: int | None
) -> tuple[torch.nn.Module, Any, str]:
    """Load a Hugging Face folder or name into a bridge; returns it with its tokenizer and short name."""
    import transformers
    from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module
    from transformer_lens.model_bridge.sources._hf_format import determine_architecture_from_hf_config
    from transformer_lens.model_bridge.sources.transformers.helpers import get_hf_model_class_for_architecture
    from transformer_lens.tools.model_registry.registry_io import resolve_model_alias

    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    local = Path(source).is_dir()
    if not local and not _looks_like_hub_name(source):
        raise ModelError(f"model {source}: no such folder, and not the name of a model")
    official = source if local else (resolve_model_alias(source) or source)
    known = None if local or random_init is None else OFFLINE_CONFIGS.get(official.rsplit("/", 1)[-1])
    offline = local or known is not None or not _hub_answers()
    config = _transformers_config(official, shape=known, offline=offline, source=source)
    try:
        architecture = determine_architecture_from_hf_config(config)
        model_class = get_hf_model_class_for_architecture(architecture)
    except LOADING_ERRORS as exc:
        raise ModelError(f"model {source}: transformer-lens does not support it ({_first_line(exc)})") from exc
    if random_init is not None:
        inner = _from_config(model_class, config, seed=random_init, source=source)
    else:
        inner = _from_pretrained(model_class, official, config, dtype=dtype, offline=offline, source=source)
    inner = inner.to(device=device, dtype=dtype).eval().requires_grad_(False)
    try:
        bridge = build_bridge_from_module(inner, architecture, hf_config=config, model_name=source)
    except LOADING_ERRORS as exc:
        raise ModelError(f"model {source}: transformer-lens does not support it ({_first_line(exc)})") from exc
    if tokenizer is not None:
        found = load_tokenizer(tokenizer)
    elif random_init is not None and not local:
        found = None
    else:
        found = load_tokenizer(official, model_type=config.model_type)
    return bridge, found, Path(source).resolve().name if local else source


def _hub_answers() -> bool:
    """Whether the model hub can be reached: asked once, since its client tries again for half a minute."""
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        get_session().head(constants.ENDPOINT, timeout=HUB_TIMEOUT_S)
    except Exception:  # of requests or httpx, depending on the version
        return False
    return True


def _transformers_config(official: str, *, shape: dict[str, int] | None, offline: bool, source: str) -> Any:
    import transformers

    if shape is not None:
        config = transformers.GPT2Config(**shape, architectures=["GPT2LMHeadModel"])  # type: ignore[arg-type]
    else:
        try:
            config = transformers.AutoConfig.from_pretrained(
                official, local_files_only=offline, trust_remote_code=False
            )
        except LOADING_ERRORS as exc:
            raise _not_loaded(source, offline=offline, exc=exc) from exc
    config._attn_implementation = "eager"  # other implementations never compute the patterns
    return config


def _from_config(model_class: Any, config: Any, *, seed: int, source: str) -> Any:
    """Build a model with fresh weights."""
    torch.manual_seed(seed)
    try:
        if hasattr(model_class, "_from_config"):
            return model_class._from_config(config)
        return model_class.from_config(config, attn_implementation="eager", trust_remote_code=False)
    except LOADING_ERRORS as exc:
        raise ModelError(f"model {source}: no model can be built from its config ({_first_line(exc)})") from exc


def _from_pretrained(
    model_class: Any, official: str, config: Any, *, dtype: torch.dtype, offline: bool, source: str
) -> Any:
    """Load weights from safetensors; transformers would make up what does not fit or is missing, which is refused."""
    try:
        found, report = model_class.from_pretrained(
            official,
            config=config,
            dtype=dtype,
            attn_implementation="eager",
            use_safetensors=True,
            local_files_only=offline,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    except LOADING_ERRORS as exc:
        raise _not_loaded(source, offline=offline, exc=exc) from exc
    lacking = {
        "no weights": report["missing_keys"],
        "weights of other shapes": [key for key, *_ in report["mismatched_keys"]],
    }
    for what, keys in lacking.items():
        if keys:
            more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
            raise ModelError(f"model {source}: the checkpoint has {what} for {', '.join(sorted(keys)[:3])}{more}")
    return found


def _not_loaded(source: str, *, offline: bool, exc: Exception) -> ModelError:
    folder = Path(source)
    if not folder.is_dir():
        why = "the model hub cannot be reached" if offline else f"the model hub has none to use ({_first_line(exc)})"
        return ModelError(
            f"model {source}: not a local folder, and {why}; "
            "give a local folder, or --random-init SEED for fresh weights of a known architecture"
        )
    if not (folder / "config.json").is_file():
        return ModelError(f"model {source}: the folder has no config.json")
    if not any(folder.glob("*.safetensors")):
        return ModelError(f"model {source}: the folder has no .safetensors file (pickled weights are never loaded)")
    return ModelError(f"model {source} cannot be loaded: {_first_line(exc)}")


def _sentencepiece_tokenizer(folder: Path, options: dict[str, Any]) -> Any:
    import sentencepiece
    import transformers

    try:
        reference = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    except (OSError, RuntimeError) as exc:
        raise ModelError(f"{folder / 'tokenizer.model'} is no SentencePiece model: {_first_line(exc)}") from exc
    for loader in (transformers.AutoTokenizer, transformers.LlamaTokenizer):
        try:
            found = loader.from_pretrained(str(folder), **options)
        except LOADING_ERRORS:
            continue
        if all(
            list(found(text, add_special_tokens=False).input_ids) == reference.encode(text) for text in TOKENIZER_PROBES
        ):
            return found
    raise ModelError(
        f"{folder / 'tokenizer.model'}: transformers and SentencePiece read it differently; give --tokenizer or tokens"
    )


def _device(name: str | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as exc:
        raise SettingError(f"--device {name}: not available here ({_first_line(exc)})") from exc
    return device


def _looks_like_hub_name(name: str) -> bool:
    parts = name.split("/")
    return len(parts) <= 2 and all(part and part[0].isalnum() for part in parts) and not name.endswith(".json")


def _first_line(exc: BaseException) -> str:
    return (str(exc).strip().splitlines() or [type(exc).__name__])[0][:300]
