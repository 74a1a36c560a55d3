"""Stored values equal `run_with_cache` of the single unpadded prompt: every kind of model, any batch composition."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hooked import TinyModel, random_prompts
from transformer_lens.config import TransformerBridgeConfig
from transformer_lens.model_bridge import TransformerBridge
from transformers import BertConfig, GPT2Config, GPTNeoXConfig, LlamaConfig

import actdb
from actdb.harvesting.capture import top_entries
from actdb.harvesting.models import load_model
from actdb.harvesting.sites import LAYER_SITES, MODEL_SITES

N_LAYERS, N_HEADS, D_MODEL, D_VOCAB, N_CTX = 2, 4, 16, 40, 24
COMMON: dict[str, Any] = {
    "num_hidden_layers": N_LAYERS,
    "num_attention_heads": N_HEADS,
    "hidden_size": D_MODEL,
    "vocab_size": D_VOCAB,
    "max_position_embeddings": N_CTX,
}
CONFIGS = {
    "gpt2": GPT2Config(
        n_layer=N_LAYERS,
        n_head=N_HEADS,
        n_embd=D_MODEL,
        vocab_size=D_VOCAB,
        n_positions=N_CTX,
        architectures=["GPT2LMHeadModel"],
    ),
    "llama-gqa": LlamaConfig(**COMMON, intermediate_size=24, num_key_value_heads=2, architectures=["LlamaForCausalLM"]),
    "neox": GPTNeoXConfig(**COMMON, intermediate_size=24, architectures=["GPTNeoXForCausalLM"]),
    "bert": BertConfig(**COMMON, intermediate_size=24, architectures=["BertForMaskedLM"]),
}
LACKING = {
    "gpt2": {"mlp_pre_linear"},
    "llama-gqa": set(),
    "neox": {"mlp_pre_linear", "resid_mid"},
    "bert": {"mlp_pre_linear"},
    "native": {"mlp_pre_linear"},
    "native-attn-only": {"mlp_pre_linear", "mlp_pre", "mlp_post", "mlp_out", "resid_mid"},
}
FREE = ("attn.hook_attn_scores",)
PROMPTS = [{"tokens": torch.randint(0, D_VOCAB, (n,)).tolist()} for n in (1, 2, 24, 7, 7, 13, 3, 24, 5)]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of tiny models with larger than usual random weights, so that values differ clearly."""
    folders = {}
    for name, config in CONFIGS.items():
        folder = tmp_path_factory.mktemp(name)
        config.save_pretrained(folder)
        bridge = load_model(folder, random_init=0).module
        inner = bridge.original_model
        clean = type(inner)(config)
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(1)
            for key, parameter in clean.named_parameters():
                if parameter.ndim > 1:
                    parameter.normal_(0, 0.35)
                elif "bias" in key:
                    parameter.normal_(0, 0.1)
        clean.save_pretrained(folder)
        folders[name] = folder
    for name, extra in {"native": {"d_mlp": 24, "act_fn": "gelu"}, "native-attn-only": {"attn_only": True}}.items():
        cfg = TransformerBridgeConfig(
            n_layers=N_LAYERS,
            d_model=D_MODEL,
            n_heads=N_HEADS,
            d_head=4,
            d_vocab=D_VOCAB,
            n_ctx=N_CTX,
            act_fn=extra.get("act_fn", "relu"),
            normalization_type="LN",
            seed=0,
            initializer_range=0.3,
            **{key: value for key, value in extra.items() if key != "act_fn"},
        )
        folders[name] = tmp_path_factory.mktemp(name)
        actdb.save_model(TransformerBridge.boot_native(cfg), folders[name])
    return folders


def hook_name(site: str, layer: int | None) -> str:
    return MODEL_SITES[site] if layer is None else f"blocks.{layer}.{LAYER_SITES.get(site, site)}"


def expected(site: str, cached: torch.Tensor, *, causal: bool) -> np.ndarray:
    """A cached activation of one prompt in the stored order of axes."""
    value = cached[0].float().numpy()
    if value.ndim == 3 and value.shape[-1] == value.shape[-2] and site in ("pattern", *FREE):
        return np.tril(value) if causal else value
    return value.transpose(1, 0, 2) if value.ndim == 3 else value


def check_run(run: actdb.Run, bridge: Any, prompts: list[dict[str, Any]], *, tolerance: float = 2e-5) -> None:
    """Compare every stored value of a run with `run_with_cache`."""
    with torch.inference_mode():
        caches = [bridge.run_with_cache(torch.tensor([prompt["tokens"]]))[1] for prompt in prompts]
    for site in run.sites:
        layers: list[int | None] = list(run.info.site(site).layers) or [None]
        for layer in layers:
            index = {} if layer is None else {"layer": layer}
            wanted = [expected(site, cache[hook_name(site, layer)], causal=run.info.causal) for cache in caches]
            scale = max(float(np.abs(value).max()) for value in wanted)
            for prompt, value in enumerate(wanted):
                stored = run[site].sel(prompt=prompt, **index).numpy()
                assert stored.shape == value.shape, (site, layer, prompt)
                assert np.abs(stored.astype(np.float32) - value).max() <= tolerance * scale, (site, layer, prompt)


@pytest.mark.parametrize("name", LACKING)
@pytest.mark.parametrize(
    ("batch_tokens", "part_tokens", "codec"), [(1, 10, "raw"), (60, 30, "lz4"), (4096, None, "lz4")]
)
def test_every_site_equals_run_with_cache(
    models: dict[str, Path], tmp_path: Path, name: str, batch_tokens: int, part_tokens: int | None, codec: str
) -> None:
    bridge = load_model(models[name]).module
    sites = [site for site in (*LAYER_SITES, *MODEL_SITES, *FREE) if site not in LACKING[name]]
    run = actdb.harvest(
        models[name],
        PROMPTS,
        tmp_path / "x.actdb",
        sites=sites,
        store="float32",
        codec=codec,
        batch_tokens=batch_tokens,
        part_tokens=part_tokens,
    )
    assert set(run.sites) == set(sites)
    assert run.info.causal == (name != "bert")
    assert run.info.n_rows == sum(len(prompt["tokens"]) for prompt in PROMPTS)  # pads are never stored
    assert part_tokens is None or run.info.n_parts > 2
    check_run(run, bridge, PROMPTS)
    for site in LACKING[name]:
        with pytest.raises(actdb.SiteError, match="available: .*resid_post"):
            actdb.harvest(models[name], PROMPTS, tmp_path / "y.actdb", sites=[site])
    assert not (tmp_path / "y.actdb").exists()


@pytest.mark.parametrize("name", ["gpt2", "llama-gqa"])
def test_folded_weights(models: dict[str, Path], tmp_path: Path, name: str) -> None:
    run = actdb.harvest(
        models[name], PROMPTS, tmp_path / "x.actdb", processing="folded", store="float32", batch_tokens=50
    )
    bridge: Any = load_model(models[name]).module
    bridge.enable_compatibility_mode(disable_warnings=True)
    check_run(run, bridge, PROMPTS)
    plan = run.info.plan
    assert plan["processing"] == "folded"
    assert plan["fold_ln"] is True
    assert plan["center_unembed"] is True
    assert plan["center_writing_weights"] is (name == "gpt2")
    raw = actdb.harvest(models[name], PROMPTS, tmp_path / "x.actdb", run="raw", store="float32")
    assert raw.info.plan["fold_ln"] is False
    assert raw.info.plan["weights_sha256"] != plan["weights_sha256"]


@pytest.mark.parametrize("causal", [True, False])
def test_plain_module(tmp_path: Path, causal: bool) -> None:
    """A module whose forward takes ids alone: padded where it is causal, equal lengths where it is not."""

    class NoMask(TinyModel):
        def forward(self, ids: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
            return super().forward(ids)

    module, prompts = NoMask(causal=causal).eval(), random_prompts(30)
    sites = ["pattern", "z", "k", "hook_pooled"]
    run = actdb.harvest(module, prompts, tmp_path / "x.actdb", store="float32", batch_tokens=40, sites=sites)
    assert run.info.causal is causal
    for prompt, given in enumerate(prompts):
        seen: dict[str, torch.Tensor] = {}
        for layer, block in enumerate(module.blocks):
            for site in ("pattern", "z", "k"):
                point = getattr(block.attn, f"hook_{site}")
                point.add_hook(lambda t, hook, seen=seen, key=f"{site}{layer}": seen.__setitem__(key, t.clone()))
        module.hook_pooled.add_hook(lambda t, hook, seen=seen: seen.__setitem__("pooled", t.clone()))
        with torch.inference_mode():
            module(torch.tensor([given["tokens"]]))
        for part in module.modules():
            if hasattr(part, "remove_hooks"):
                part.remove_hooks()
        for layer in range(2):
            assert np.allclose(
                run["pattern"].sel(layer=layer, prompt=prompt).numpy(), seen[f"pattern{layer}"][0], atol=1e-5
            )
            for site in ("z", "k"):
                wanted = seen[f"{site}{layer}"][0].transpose(0, 1)
                assert np.allclose(run[site].sel(layer=layer, prompt=prompt).numpy(), wanted, rtol=1e-4, atol=1e-4)
        assert np.allclose(run["hook_pooled"].sel(prompt=prompt).numpy(), seen["pooled"][0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_side_of_the_tokenizer_does_not_matter(models: dict[str, Path], tmp_path: Path, side: str) -> None:
    from tokenizers import Tokenizer, models as kinds, pre_tokenizers  # noqa: I001 - one line is clearer
    from transformers import PreTrainedTokenizerFast

    words = {f"w{i}": i for i in range(D_VOCAB - 2)} | {"<s>": D_VOCAB - 2, "<p>": D_VOCAB - 1}
    backend = Tokenizer(kinds.WordLevel(words, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", pad_token="<p>", padding_side=side)
    texts = ["w1 w2 w3", "w4", "w5 w6 w7 w8 w9 w1 w1"]
    run = actdb.harvest(
        models["gpt2"], [{"text": text} for text in texts], tmp_path / "x.actdb", tokenizer=tokenizer, store="float32"
    )
    ids = [[D_VOCAB - 2, *(words[word] for word in text.split())] for text in texts]
    assert [run.tokens(prompt).tolist() for prompt in range(3)] == ids
    check_run(run, load_model(models["gpt2"]).module, [{"tokens": prompt} for prompt in ids])
    plain = actdb.harvest(
        models["gpt2"],
        [{"text": text} for text in texts],
        tmp_path / "x.actdb",
        run="plain",
        tokenizer=tokenizer,
        bos=False,
    )
    assert plain.tokens(0).tolist() == ids[0][1:]
    assert plain.info.plan["bos"] is False


def test_last_positions(models: dict[str, Path], tmp_path: Path) -> None:
    keep: dict[str, Any] = {"store": "float32", "batch_tokens": 60}
    whole = actdb.harvest(models["gpt2"], PROMPTS, tmp_path / "x.actdb", run="whole", **keep)
    last = actdb.harvest(models["gpt2"], PROMPTS, tmp_path / "x.actdb", run="last", positions="last", **keep)
    assert last.info.n_rows == len(PROMPTS)
    for site in ("resid_post", "z"):
        assert np.array_equal(last[site].numpy(), whole[site].sel(pos=-1).numpy())
    for prompt in range(len(PROMPTS)):
        square = whole["pattern"].sel(layer=1, head=2, prompt=prompt).numpy()
        assert np.array_equal(last["pattern"].sel(layer=1, head=2, prompt=prompt).numpy(), square[-1:])
    with pytest.raises(actdb.SelectionError, match="last position"):
        last["z"].sel(prompt=2, pos=0).numpy()


def test_top_patterns(models: dict[str, Path], tmp_path: Path) -> None:
    whole = actdb.harvest(models["gpt2"], PROMPTS, tmp_path / "x.actdb", run="whole", store="float32")
    top = actdb.harvest(models["gpt2"], PROMPTS, tmp_path / "x.actdb", run="top", store="float32", pattern="topk:3")
    assert "pattern" not in top
    for prompt in (0, 2, 5):
        square = whole["pattern"].sel(prompt=prompt).numpy()
        values, keys = (top[f"pattern_{part}"].sel(prompt=prompt).numpy() for part in ("value", "index"))
        n = square.shape[-1]
        for query in range(n):
            order = np.argsort(-square[:, :, query], axis=-1, kind="stable")[..., : min(3, query + 1)]
            count = order.shape[-1]
            assert np.array_equal(keys[:, :, query, :count], order)
            assert np.array_equal(values[:, :, query, :count], np.take_along_axis(square[:, :, query], order, -1))
            assert (keys[:, :, query, count:] == 2**16 - 1).all()
            assert (values[:, :, query, count:] == 0).all()


def test_top_entries_breaks_ties_by_the_lower_key() -> None:
    pattern = torch.tensor([[[[0.25, 0.25, 0.25, 0.25]]]])
    assert top_entries(pattern, 2, values=False).flatten().tolist() == [0, 1]


def test_layers_keep_their_numbers(models: dict[str, Path], tmp_path: Path) -> None:
    run = actdb.harvest(models["gpt2"], PROMPTS, tmp_path / "x.actdb", layers=[1], store="float32")
    assert run.layers == (1,)
    check_run(run, load_model(models["gpt2"]).module, PROMPTS)
    with pytest.raises(actdb.SelectionError, match="layer 0: there are layers 1 to 1"):
        run["z"].sel(layer=0)
    with pytest.raises(actdb.SettingError, match="layers 0 to 1"):
        actdb.harvest(models["gpt2"], PROMPTS, tmp_path / "y.actdb", layers=[2])


def test_bfloat16_is_stored_exactly(models: dict[str, Path], tmp_path: Path) -> None:
    run = actdb.harvest(models["gpt2"], PROMPTS[:3], tmp_path / "x.actdb", dtype="bfloat16", batch_tokens=1)
    assert run["resid_post"].dtype == np.float32
    stored = np.concatenate([run[site].numpy().ravel() for site in ("resid_post", "z", "mlp_post")])
    assert (stored.view(np.uint32) & 0xFFFF == 0).all()
    check_run(run, load_model(models["gpt2"], dtype="bfloat16").module, PROMPTS[:3], tolerance=0)


def test_float16_and_precision_keep_their_word(models: dict[str, Path], tmp_path: Path) -> None:
    exact = actdb.harvest(models["gpt2"], PROMPTS, tmp_path / "x.actdb", run="exact", store="float32")
    half = actdb.harvest(models["gpt2"], PROMPTS, tmp_path / "x.actdb", run="half")
    rounded = actdb.harvest(models["gpt2"], PROMPTS, tmp_path / "x.actdb", run="rounded", precision=5)
    with actdb.open(tmp_path / "x.actdb") as db:
        errors = dict(db.sql("SELECT (run, site), max_abs_error FROM sites").fetchall())
    for site in ("resid_post", "z", "mlp_post"):
        want = exact[site].numpy()
        assert np.array_equal(half[site].numpy(), want.astype(np.float16))
        bits = rounded[site].numpy().view(np.uint16)
        assert (bits & 0b11111 == 0).all()
        assert errors["exact", site] == 0
        for run in (half, rounded):
            error = float(np.abs(run[site].numpy().astype(np.float32) - want).max())
            assert 0 < error <= errors[run.name, site] < 8 * error


def test_overflow_names_the_site_and_stores_nothing(models: dict[str, Path], tmp_path: Path) -> None:
    module = load_model(models["gpt2"]).module
    with torch.no_grad():
        module.original_model.transformer.wte.weight.mul_(1e6)
    with pytest.raises(actdb.OverflowingError, match="resid_post.*--store float32"):
        actdb.harvest(module, PROMPTS, tmp_path / "x.actdb")
    with actdb.open(tmp_path / "x.actdb") as db:
        assert [run.status for run in db.runs()] in ([], ["partial"])
        assert db.verify() == []
    run = actdb.harvest(module, PROMPTS, tmp_path / "x.actdb", run="wide", store="float32")
    assert np.isfinite(run["resid_post"].numpy()).all()


def test_overflow_that_the_probe_missed_fails_the_part(tmp_path: Path) -> None:
    """Token 5 alone overflows, and no probed prompt (the longest of each length bucket) holds it."""
    module = TinyModel()
    with torch.no_grad():
        module.W_E[5] *= 1e6
    prompts = [{"tokens": [1, 2, 3]}, {"tokens": [1, 5, 3]}]
    with pytest.raises(actdb.OverflowingError, match="resid_post of layer 0 is beyond what float16 holds"):
        actdb.harvest(module, prompts, tmp_path / "x.actdb", sites=["resid_post"])
    with actdb.open(tmp_path / "x.actdb") as db:
        assert db.run().status == "partial"
        assert db.verify() == []
    assert not list((tmp_path / "x.actdb").rglob(".tmp-*"))


def test_not_a_number_is_refused(tmp_path: Path) -> None:
    module = TinyModel()
    with torch.no_grad():
        module.W_E[5] = torch.nan
    with pytest.raises(actdb.OverflowingError, match="the model itself"):
        actdb.harvest(module, [{"tokens": [1, 5, 3]}], tmp_path / "x.actdb")


def test_interventions_are_stored(models: dict[str, Path], tmp_path: Path) -> None:
    bridge: Any = load_model(models["gpt2"]).module
    name = "blocks.0.attn.hook_z"

    def ablate(z: torch.Tensor, hook: Any) -> torch.Tensor:
        return torch.cat([torch.zeros_like(z[:, :, :1]), z[:, :, 1:]], dim=2)

    with pytest.raises(actdb.SettingError, match="hooks_id"):
        actdb.harvest(bridge, PROMPTS, tmp_path / "x.actdb", hooks=[(name, ablate)])
    with pytest.raises(actdb.SettingError, match="no hook point"):
        actdb.harvest(bridge, PROMPTS, tmp_path / "x.actdb", run="a", hooks_id="h", hooks=[("blocks.9.x", ablate)])
    run = actdb.harvest(
        bridge,
        PROMPTS,
        tmp_path / "x.actdb",
        run="ablated",
        hooks_id="zero L0H0",
        hooks=[(name, ablate)],
        store="float32",
    )
    assert (run["z"].sel(layer=0, head=0).numpy() == 0).all()
    with bridge.hooks(fwd_hooks=[(name, ablate)]):
        check_run(run, bridge, PROMPTS)
    assert run.info.plan["hooks_id"] == "zero L0H0"
