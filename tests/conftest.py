"""Fixtures shared by several test modules: tiny models in folders, and the bridges that their harvests are held to."""

import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

settings.register_profile("repeatable", derandomize=True)  # the same examples everywhere
settings.load_profile("repeatable")

os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny matrices: a second thread costs more than it brings

D_VOCAB, N_CTX = 48, 24
SHAPE = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": D_VOCAB}
LONG = {"max_position_embeddings": N_CTX, "initializer_range": 0.3, "intermediate_size": 20}
SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": (
        "GPT2",
        {
            "n_embd": 24,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": N_CTX,
            "vocab_size": D_VOCAB,
            "initializer_range": 0.3,
        },
    ),
    "llama": ("Llama", {**SHAPE, **LONG, "num_key_value_heads": 2}),
    "neox": ("GPTNeoX", {**SHAPE, **LONG}),
    "bert": ("Bert", {**SHAPE, **LONG, "pad_token_id": 0}),
    "mixtral": ("Mixtral", {**SHAPE, **LONG, "num_key_value_heads": 2, "num_local_experts": 3}),
}
NATIVE: dict[str, dict[str, Any]] = {
    "native-attn": {"attn_only": True, "normalization_type": None},
    "native-mlp": {"normalization_type": "LN", "act_fn": "gelu_new"},
}


def hugging_face_model(kind: str, *, seed: int = 0, **changes: Any) -> Any:
    """Build a model with random weights of which no bias or norm is trivial."""
    import torch
    import transformers

    name, fields = CONFIGS[kind]
    config = getattr(transformers, f"{name}Config")(**{**SPECIAL, **fields, **changes}, attn_implementation="eager")
    head = "ForMaskedLM" if kind == "bert" else "LMHeadModel" if kind == "gpt2" else "ForCausalLM"
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = getattr(transformers, name + head)(config).eval()
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return model


def native_model(kind: str) -> Any:
    """Build a TransformerLens-native bridge."""
    import torch
    from transformer_lens.config import TransformerBridgeConfig
    from transformer_lens.model_bridge.sources.native import boot

    shape = {"n_layers": 2, "d_model": 24, "n_heads": 3, "d_head": 6, "n_ctx": N_CTX, "d_vocab": D_VOCAB}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        bridge = boot(TransformerBridgeConfig(**shape, **NATIVE[kind], device="cpu", seed=1), dtype=torch.float32)
        for parameter in bridge.parameters():
            parameter.data.add_(torch.randn_like(parameter), alpha=0.2)
    bridge.original_model.eval()
    return bridge.eval()


@pytest.fixture(scope="session")
def build() -> Callable[..., Any]:
    """Return the function that builds a Hugging Face model: `build("llama", seed=1, **config)`."""
    return hugging_face_model


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function from a kind of model to a folder that holds one, without tokenizer."""
    root = tmp_path_factory.mktemp("models")

    @cache
    def folder(kind: str) -> Path:
        import actdb

        if kind in NATIVE:
            actdb.save_model(native_model(kind), root / kind)
        else:
            hugging_face_model(kind).save_pretrained(root / kind)
        return root / kind

    return folder


@pytest.fixture(scope="session")
def bridge() -> Callable[..., Any]:
    """Return a function from a kind of model to its bridge, made without actdb: `bridge("gpt2", folded=True)`."""

    @cache
    def made(kind: str, *, dtype: str = "float32", folded: bool = False) -> Any:
        import torch
        from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module

        if kind in NATIVE:
            found = native_model(kind)
        else:
            model = hugging_face_model(kind).to(getattr(torch, dtype))
            found = build_bridge_from_module(model, type(model).__name__, hf_config=model.config, model_name=kind)
        if folded:
            found.enable_compatibility_mode(disable_warnings=True)
        return found

    return made
