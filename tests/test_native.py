"""The TransformerLens-native folder round-trips bit by bit and refuses what does not fit."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformer_lens.config import TransformerBridgeConfig
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.sources.native import boot

from actdb.errors import ActdbError, ModelError
from actdb.harvesting.native import is_native_folder, load_native, random_native, save_model

SHAPE = {"n_layers": 2, "d_model": 16, "n_heads": 4, "d_head": 6, "n_ctx": 12, "d_vocab": 20}
ARCHITECTURES = {
    "attn_only": {"attn_only": True, "normalization_type": None},
    "attn_only_ln": {"attn_only": True, "normalization_type": "LN"},
    "mlp": {"normalization_type": "LN", "act_fn": "gelu_new"},
    "mlp_pre": {"normalization_type": "LNPre", "act_fn": "solu_ln", "eps": 1e-3},
    "llama": {
        "normalization_type": "RMS",
        "final_rms": True,
        "gated_mlp": True,
        "act_fn": "silu",
        "positional_embedding_type": "rotary",
        "rotary_dim": 4,
        "rotary_base": 500,
        "n_key_value_heads": 2,
    },
    "unusual": {
        "attention_dir": "bidirectional",
        "attn_scale": 3.0,
        "attn_scores_soft_cap": 5.0,
        "output_logits_soft_cap": 4.0,
        "d_vocab_out": 7,
        "d_mlp": 24,
    },
}
IDS = torch.tensor([[0, 3, 19, 7, 7, 2, 11, 4], [5, 5, 1, 18, 0, 9, 13, 6]])


def build(*, dtype: torch.dtype = torch.float32, rope_scaling: Any = None, **fields: Any) -> TransformerBridge:
    """A native bridge of which every weight, norms and biases included, differs from its initial value."""
    config = TransformerBridgeConfig(**{**SHAPE, **fields}, device="cpu", seed=3)
    if rope_scaling is not None:
        config.rope_scaling = rope_scaling
    bridge = boot(config, dtype=dtype)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for tensor in bridge.state_dict().values():
            tensor.add_(torch.randn(tensor.shape, generator=generator).to(tensor.dtype), alpha=0.3)
    return bridge


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_model(build(attn_only=True), tmp_path / "model")
    return tmp_path / "model"


def edit_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    config.update(changes)
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_round_trip_gives_equal_logits(architecture: str, tmp_path: Path) -> None:
    bridge = build(**ARCHITECTURES[architecture])
    save_model(bridge, tmp_path)

    loaded = load_native(tmp_path)

    assert torch.equal(loaded(IDS), bridge(IDS))
    assert {name: tensor.shape for name, tensor in loaded.state_dict().items()} == {
        name: tensor.shape for name, tensor in bridge.state_dict().items()
    }
    assert not torch.equal(random_native(tmp_path, 0)(IDS), bridge(IDS))


def test_round_trip_keeps_rope_scaling(tmp_path: Path) -> None:
    rotary = {"positional_embedding_type": "rotary", "normalization_type": "RMS"}
    bridge = build(**rotary, rope_scaling={"rope_type": "linear", "factor": 2.0})
    save_model(bridge, tmp_path)

    assert torch.equal(load_native(tmp_path)(IDS), bridge(IDS))
    assert not torch.equal(build(**rotary)(IDS), bridge(IDS))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtype_is_the_stored_one_unless_asked_otherwise(dtype: torch.dtype, tmp_path: Path) -> None:
    bridge = build(dtype=dtype)
    save_model(bridge, tmp_path)

    loaded = load_native(tmp_path)
    converted = load_native(tmp_path, dtype=torch.float32)

    assert loaded.cfg.dtype == dtype
    assert torch.equal(loaded(IDS), bridge(IDS))
    assert converted.cfg.dtype == torch.float32
    assert torch.equal(converted.state_dict()["embed.weight"], bridge.state_dict()["embed.weight"].float())
    assert converted(IDS).dtype == torch.float32


def test_loaded_model_is_frozen_and_leaves_the_global_generator_alone(folder: Path) -> None:
    state = torch.random.get_rng_state()

    for bridge in (load_native(folder), random_native(folder, 1)):
        assert not bridge.training
        assert not any(module.training for module in bridge.original_model.modules())
        assert not any(parameter.requires_grad for parameter in bridge.parameters())

    assert torch.equal(torch.random.get_rng_state(), state)


def test_saving_is_deterministic_and_leaves_two_files(tmp_path: Path) -> None:
    for name in ("a", "b"):
        save_model(build(), tmp_path / name)
    save_model(load_native(tmp_path / "a"), tmp_path / "c")
    save_model(build(), tmp_path / "a")  # replaces

    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["config.json", "model.safetensors"]
    for file in ("config.json", "model.safetensors"):
        assert len({(tmp_path / name / file).read_bytes() for name in "abc"}) == 1


def test_weights_have_clean_names_once(folder: Path) -> None:
    names = load_file(folder / "model.safetensors").keys()

    assert "blocks.0.attn.q.weight" in names
    assert not any("_original_component" in name for name in names)
    assert len(names) == 3 + 2 * (8 + 2) + 2 + 1  # embed, pos, unembed; attention, ln1; ln_final; unembed bias


def test_seed_is_not_saved_and_initialisation_does_not_matter(folder: Path) -> None:
    logits = load_native(folder)(IDS)
    assert "seed" not in json.loads((folder / "config.json").read_text())

    edit_config(folder, init_mode="xavier_uniform", initializer_range=7.0)

    assert torch.equal(load_native(folder)(IDS), logits)


def test_random_native_is_what_boot_native_draws(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    config = TransformerBridgeConfig(**SHAPE, attn_only=True, device="cpu", seed=11)

    first, again, other = (random_native(folder, seed) for seed in (11, 11, 12))

    assert torch.equal(first(IDS), boot(config)(IDS))
    assert torch.equal(first(IDS), again(IDS))
    assert not torch.equal(first(IDS), other(IDS))


def test_is_native_folder(folder: Path, tmp_path: Path) -> None:
    assert is_native_folder(folder)
    assert not is_native_folder(tmp_path)
    assert not is_native_folder(tmp_path / "absent")
    for text in ('{"model_type": "gpt2"}', "[]", "{", "\xff"):
        (tmp_path / "config.json").write_text(text, encoding="latin-1")
        assert not is_native_folder(tmp_path)


def test_save_refuses_a_module_that_is_no_native_bridge(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="Linear is not a TransformerLens-native model.*save_pretrained"):
        save_model(torch.nn.Linear(2, 2), tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_save_refuses_a_model_in_compatibility_mode(tmp_path: Path) -> None:
    bridge = build()
    bridge.enable_compatibility_mode()

    with pytest.raises(ModelError, match="compatibility mode"):
        save_model(bridge, tmp_path / "model")


def test_save_refuses_mixed_dtypes(tmp_path: Path) -> None:
    bridge = build()
    bridge.blocks[1].attn.half()

    with pytest.raises(ModelError, match="dtypes float16, float32"):
        save_model(bridge, tmp_path / "model")


def test_save_does_not_overwrite_a_model_of_another_format(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')

    with pytest.raises(ModelError, match="another format"):
        save_model(build(), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "other"}, "does not describe a TransformerLens-native model"),
        ({"dtype": "int8"}, "dtype 'int8' is not one of"),
        ({"dtype": ["float32"]}, r"dtype is \['float32'\], not str"),
        ({"n_layers": 0}, "n_layers is 0, not positive"),
        ({"d_model": "16"}, "d_model is '16', not int"),
        ({"n_heads": True}, "n_heads is True, not int"),
        ({"eps": None}, "eps is None, not float or int"),
        ({"rotary_dim": 2.5}, "rotary_dim is 2.5, not int or null"),
        ({"sparse": True}, "unexpected field sparse"),
        ({"positional_embedding_type": "alibi"}, "no model can be built from it: .*'alibi'"),
        ({"n_key_value_heads": 3}, "no model can be built from it"),
        ({"n_layers": 3}, "missing weight blocks.2.attn.k.bias, .* and 5 more"),
        ({"n_layers": 1}, "unexpected weight blocks.1.attn.k.bias"),
        ({"d_vocab": 21}, r"embed.weight is \[20, 16\] instead of \[21, 16\]"),
    ],
)
def test_load_refuses_a_wrong_configuration(folder: Path, changes: dict[str, Any], message: str) -> None:
    edit_config(folder, **changes)

    with pytest.raises(ModelError, match=message) as error:
        load_native(folder)
    assert "\n" not in str(error.value)


def test_load_refuses_missing_fields(folder: Path) -> None:
    (folder / "config.json").write_text('{"format": "transformer_lens_native"}')

    with pytest.raises(ModelError, match="missing field .* more"):
        load_native(folder)


def test_load_refuses_broken_files(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(ModelError, match="not a readable safetensors file"):
        load_native(folder)

    weights.unlink()
    with pytest.raises(ModelError, match=r"model\.safetensors: no such file"):
        load_native(folder)

    (folder / "config.json").write_text("{")
    with pytest.raises(ModelError, match="is not JSON"):
        load_native(folder)

    (folder / "config.json").unlink()
    with pytest.raises(ActdbError, match=r"config\.json: no such file"):
        load_native(folder)


def test_load_never_unpickles(folder: Path) -> None:
    torch.save({"embed.weight": torch.zeros(20, 16)}, folder / "model.safetensors")

    with pytest.raises(ModelError, match="not a readable safetensors file"):
        load_native(folder)


def test_load_names_a_missing_weight(folder: Path) -> None:
    weights = {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}
    del weights["blocks.1.attn.o.bias"]
    weights["blocks.1.attn.extra"] = torch.zeros(1)
    save_file(weights, folder / "model.safetensors")

    with pytest.raises(ModelError, match=r"missing weight blocks\.1\.attn\.o\.bias$"):
        load_native(folder)
