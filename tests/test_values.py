"""Stored values equal `run_with_cache` of the single unpadded prompt: every kind of model, at any batch composition."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hooked import TinyModel, random_prompts
from hypothesis import given, settings
from hypothesis import strategies as st
from transformer_lens.hook_points import HookPoint

import actdb
from actdb.harvesting.capture import top_entries

D_VOCAB, N_CTX = 48, 24
TOLERANCE = 2e-5  # of a site's largest value
HOOKS = {
    "resid_pre": "blocks.{}.hook_resid_pre",
    "resid_mid": "blocks.{}.hook_resid_mid",
    "resid_post": "blocks.{}.hook_resid_post",
    "attn_out": "blocks.{}.hook_attn_out",
    "mlp_out": "blocks.{}.hook_mlp_out",
    "mlp_pre": "blocks.{}.mlp.hook_pre",
    "mlp_pre_linear": "blocks.{}.mlp.hook_pre_linear",
    "mlp_post": "blocks.{}.mlp.hook_post",
    "q": "blocks.{}.attn.hook_q",
    "k": "blocks.{}.attn.hook_k",
    "v": "blocks.{}.attn.hook_v",
    "z": "blocks.{}.attn.hook_z",
    "pattern": "blocks.{}.attn.hook_pattern",
    "embed": "hook_embed",
    "ln_final": "ln_final.hook_normalized",
    "logits": "unembed.hook_out",
    "ln1.hook_normalized": "blocks.{}.ln1.hook_normalized",
    "attn.hook_attn_scores": "blocks.{}.attn.hook_attn_scores",
    "blocks.1.hook_resid_pre": "blocks.1.hook_resid_pre",
}
LACKING = {
    "gpt2": {"mlp_pre_linear"},
    "llama": set(),
    "neox": {"mlp_pre_linear", "resid_mid"},
    "bert": {"mlp_pre_linear"},
    "mixtral": {"mlp_pre_linear", "mlp_pre", "mlp_post"},
    "native-mlp": {"mlp_pre_linear"},
    "native-attn": {"mlp_pre_linear", "mlp_pre", "mlp_post", "mlp_out", "resid_mid", "ln_final"},
}
LENGTHS = (1, 2, 24, 7, 7, 13, 3, 24, 5, 1)
IDS = [np.random.default_rng(n).integers(0, D_VOCAB, size).tolist() for n, size in enumerate(LENGTHS)]
PROMPTS = [{"tokens": ids} for ids in IDS]

Values = Mapping[str, npt.NDArray[np.float32]]


def single_values(module: Any, ids: list[int], names: set[str]) -> Values:
    """What the hook points see of one prompt alone, without padding or mask; the batch axis is dropped."""
    with torch.inference_mode():
        cached = module.run_with_cache(torch.tensor([ids]), names_filter=lambda name: name in names)[1]
    return {name: value[0].float().numpy() for name, value in cached.items()}


def stored_order(site: str, value: npt.NDArray[np.float32], *, causal: bool) -> npt.NDArray[np.float32]:
    """[query, key] squares as they are, their upper triangle zero in causal models; [pos, head, …] → [head, pos, …]."""
    if site in ("pattern", "attn.hook_attn_scores"):
        return np.where(np.tri(value.shape[-1], dtype=bool), value, 0) if causal else value
    return value.swapaxes(0, 1) if value.ndim == 3 else value


def check_run(run: actdb.Run, module: Any, prompts: list[list[int]] = IDS, *, tolerance: float = TOLERANCE) -> None:
    """Compare every stored value of a run with the module's own."""
    names = {HOOKS[site].format(layer) for site in run.sites for layer in run.layers or (None,)}
    singles = [single_values(module, ids, names) for ids in prompts]
    assert sum(map(len, prompts)) == run.info.n_rows  # pads are never stored
    for site in run.sites:
        layers = run.info.site(site).layers
        for layer in layers or (None,):
            index = {} if layer is None else {"layer": layer}
            wanted = [stored_order(site, s[HOOKS[site].format(layer)], causal=run.info.causal) for s in singles]
            scale = max(float(np.abs(value).max()) for value in wanted)
            assert scale > 0
            for prompt, value in enumerate(wanted):
                stored = run[site].sel(prompt=prompt, **index).numpy()
                assert stored.shape == value.shape, (site, layer, prompt)
                assert np.abs(stored.astype(np.float32) - value).max() <= tolerance * scale, (site, layer, prompt)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "x.actdb"


@pytest.mark.parametrize("kind", LACKING)
@pytest.mark.parametrize(
    ("batch_tokens", "part_tokens", "codec"), [(1, 30, "raw"), (60, 10, "lz4"), (4096, None, "lz4")]
)
def test_every_site_equals_run_with_cache(
    model_folder: Any, bridge: Any, out: Path, kind: str, batch_tokens: int, part_tokens: int | None, codec: str
) -> None:
    sites = [site for site in HOOKS if site not in LACKING[kind] and (kind, site[:3]) != ("native-attn", "ln1")]
    run = actdb.harvest(
        model_folder(kind),
        PROMPTS,
        out,
        sites=sites,
        store="float32",
        codec=codec,
        batch_tokens=batch_tokens,
        part_tokens=part_tokens,
    )
    assert run.sites == tuple(sites)
    assert run.info.causal == (kind != "bert")
    assert part_tokens is None or run.info.n_parts > 2
    check_run(run, bridge(kind))


@pytest.mark.parametrize("kind", LACKING)
def test_sites_that_a_model_lacks_are_refused(model_folder: Any, out: Path, kind: str) -> None:
    for site in sorted(LACKING[kind]):
        with pytest.raises(actdb.SiteError, match="available: .*resid_post") as refused:
            actdb.harvest(model_folder(kind), PROMPTS, out, sites=["z", site])
        available = str(refused.value).split("available: ")[1].split(", ")
        assert set(available[:-1]) == {name for name in HOOKS if "hook" not in name} - LACKING[kind]
    assert not out.exists()


@pytest.mark.parametrize("kind", ["gpt2", "llama", "bert"])
def test_values_equal_the_hugging_face_model(model_folder: Any, build: Any, out: Path, kind: str) -> None:
    """A second oracle that has nothing to do with transformer-lens."""
    run = actdb.harvest(model_folder(kind), PROMPTS, out, store="float32", sites="resid_pre,pattern,logits")
    model = build(kind)
    for prompt, ids in enumerate(IDS):
        with torch.inference_mode():
            whole = model(torch.tensor([ids]), output_hidden_states=True, output_attentions=True)
        for layer in range(2):
            stored = run["resid_pre"].sel(prompt=prompt, layer=layer).numpy()
            assert np.allclose(stored, whole.hidden_states[layer][0], rtol=0, atol=TOLERANCE * 5)
            stored = run["pattern"].sel(prompt=prompt, layer=layer).numpy()
            assert np.allclose(stored, whole.attentions[layer][0], rtol=0, atol=TOLERANCE)
        scale = float(whole.logits.abs().max())
        assert np.allclose(run["logits"].sel(prompt=prompt).numpy(), whole.logits[0], rtol=0, atol=TOLERANCE * scale)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_folded_weights(model_folder: Any, bridge: Any, out: Path, kind: str) -> None:
    sites = [site for site in HOOKS if site not in LACKING[kind]]
    keep: dict[str, Any] = {"store": "float32", "sites": sites}
    run = actdb.harvest(model_folder(kind), PROMPTS, out, processing="folded", batch_tokens=50, **keep)
    check_run(run, bridge(kind, folded=True))
    flags = {"processing": "folded", "fold_ln": True, "center_writing_weights": kind == "gpt2", "center_unembed": True}
    assert {name: run.info.plan[name] for name in flags} == flags
    raw = actdb.harvest(model_folder(kind), PROMPTS, out, run="raw", **keep)
    assert {name: raw.info.plan[name] for name in flags} == {**dict.fromkeys(flags, False), "processing": "raw"}
    assert raw.info.plan["weights_sha256"] != run.info.plan["weights_sha256"]
    assert np.allclose(raw["mlp_pre"].numpy(), run["mlp_pre"].numpy(), atol=1e-4)  # what folding must not change
    assert np.allclose(raw["resid_post"].numpy(), run["resid_post"].numpy(), atol=1e-4) == (kind == "llama")


# Plain modules: hooks found by hand.


class NoMask(TinyModel):
    """A module whose forward takes ids alone."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return super().forward(ids)


class LastPooled(TinyModel):
    """A causal module with an activation of the whole prompt that padding would change: its last position's."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        x = self.W_E[ids]
        for block in self.blocks:
            x = block(x, None)
        self.hook_pooled(x[:, -1])
        return x


class FaintlyBidirectional(TinyModel):
    """Positions see each other hardly at all, and no pattern tells."""

    def __init__(self) -> None:
        super().__init__(n_layers=1)
        self.blocks[0] = torch.nn.Module()
        self.blocks[0].hook_resid_post = HookPoint()

    def forward(self, ids: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        x = self.W_E[ids] * 1e-2
        return self.blocks[0].hook_resid_post(x + 1e-3 * x.mean(1, keepdim=True))


class Repeating(TinyModel):
    """A module that passes its only block twice, as models with shared layers do."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        x = self.hook_embed(self.W_E[ids])
        return self.blocks[0](self.blocks[0](x, None), None)


class Fickle(TinyModel):
    """A module of which a hook point depends on the batch."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        x = self.hook_embed(self.W_E[ids])
        return x if ids.shape[1] == 3 else self.blocks[1](self.blocks[0](x, None), None)


class LateHook(TinyModel):
    """A module with a hook point after its unembedding."""

    def __init__(self) -> None:
        super().__init__()
        self.unembed = torch.nn.Module()
        self.unembed.hook_in, self.hook_final = HookPoint(), HookPoint()

    def forward(self, ids: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return self.hook_final(self.unembed.hook_in(self.W_E[ids]) @ self.W_E.T)


def seen_values(module: torch.nn.Module, ids: list[int]) -> Values:
    """What every hook point of a plain module sees of one prompt alone."""
    seen: dict[str, npt.NDArray[np.float32]] = {}
    handles = []
    for name, point in module.named_modules():
        if isinstance(point, HookPoint):

            def keep(_: Any, __: Any, value: torch.Tensor, name: str = name) -> None:
                seen[name] = value[0].numpy().copy()

            handles.append(point.register_forward_hook(keep))
    with torch.inference_mode():
        module(torch.tensor([ids]))
    for handle in handles:
        handle.remove()
    return seen


def check_module(run: actdb.Run, module: torch.nn.Module, prompts: list[dict[str, Any]]) -> None:
    """Compare every stored value of a run with what the plain module's hook points see."""
    for prompt, given_prompt in enumerate(prompts):
        seen = seen_values(module, given_prompt["tokens"])
        for site in run.sites:
            for layer in run.info.site(site).layers or (None,):
                index = {} if layer is None else {"layer": layer}
                value = seen[HOOKS.get(site, site).format(layer)]
                wanted = stored_order(site, value, causal=run.info.causal)
                stored = run[site].sel(prompt=prompt, **index).numpy()
                assert stored.shape == wanted.shape, (site, layer, prompt)
                scale = max(1e-9, float(np.abs(wanted).max()))
                assert np.abs(stored - wanted).max() <= 1e-5 * scale, (site, layer, prompt)


@pytest.mark.parametrize("model", [TinyModel, NoMask])
@pytest.mark.parametrize("causal", [True, False])
def test_plain_module(out: Path, model: type[TinyModel], causal: bool) -> None:
    """Without a mask a bidirectional module runs in batches of equal lengths."""
    module, prompts = model(causal=causal, n_heads=4, n_kv_heads=2), random_prompts(30)
    sites = ["resid_post", "q", "k", "v", "z", "pattern", "mlp_post", "hook_embed", "hook_pooled"]
    run = actdb.harvest(module, prompts, out, store="float32", batch_tokens=40, part_tokens=50, sites=sites)
    assert run.info.causal is causal
    assert run.info.n_entries == sum(n * (n + 1) // 2 if causal else n * n for n in (len(p["tokens"]) for p in prompts))
    check_module(run, module, prompts)


@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=12),
    batch_tokens=st.integers(1, 80),
    part_tokens=st.integers(1, 60),
    codec=st.sampled_from(["raw", "lz4"]),
    causal=st.booleans(),
)
@settings(max_examples=12, deadline=None, derandomize=True)
def test_any_batch_composition(
    tmp_path_factory: Any, lengths: list[int], batch_tokens: int, part_tokens: int, codec: str, causal: bool
) -> None:
    prompts = [{"tokens": [(7 * i + j * j) % 16 for j in range(length)]} for i, length in enumerate(lengths)]
    module = TinyModel(causal=causal)
    run = actdb.harvest(
        module,
        prompts,
        tmp_path_factory.mktemp("any") / "x",
        store="float32",
        batch_tokens=batch_tokens,
        part_tokens=part_tokens,
        codec=codec,
    )
    check_module(run, module, prompts)


def test_an_activation_of_the_whole_prompt_does_not_see_pads(out: Path) -> None:
    module, prompts = LastPooled(), random_prompts(20)
    run = actdb.harvest(module, prompts, out, store="float32", sites=["hook_pooled", "resid_post"])
    check_module(run, module, prompts)
    assert run["hook_pooled"].dims == ("prompt", "feature")


def test_causality_is_measured_on_the_activations_own_scale(out: Path) -> None:
    module, prompts = FaintlyBidirectional(), random_prompts(20)
    run = actdb.harvest(module, prompts, out, store="float32")
    assert run.info.causal is False
    check_module(run, module, prompts)


@pytest.mark.parametrize("n_heads", [1, 2, 3, 4, 5, 7])
def test_axes_of_equal_extent_are_told_apart(out: Path, n_heads: int) -> None:
    """Heads, their width, the context: all the same number, so that the shape of q is that of a pattern."""
    module = NoMask(n_heads=n_heads, n_kv_heads=n_heads, d_model=n_heads**2, n_ctx=n_heads)
    prompts = [{"tokens": list(range(1, n + 1))} for n in range(1, n_heads + 1)]
    run = actdb.harvest(module, prompts, out, store="float32", sites=["z", "q", "k", "pattern", "resid_post"])
    assert run.info.site("q").dims == ("layer", "head", "row", "d_head")
    check_module(run, module, prompts)


def test_hook_points_that_fire_several_times_are_refused(out: Path) -> None:
    with pytest.raises(actdb.SiteError, match="passes site 'resid_post' 2 times"):
        actdb.harvest(Repeating(n_layers=1), random_prompts(5), out, sites=["resid_post"])
    with pytest.raises(actdb.SiteError, match="none of the default sites .* available: embed, and any hook suffix"):
        actdb.harvest(Repeating(n_layers=1), random_prompts(5), out)
    run = actdb.harvest(Repeating(n_layers=1), random_prompts(5), out, sites=["hook_embed"], store="float32")
    assert run.info.plan["statistics"] == []
    check_module(run, Repeating(n_layers=1), random_prompts(5))


def test_hook_points_that_depend_on_the_batch_are_refused(out: Path) -> None:
    with pytest.raises(actdb.ModelError, match="'resid_post' 0 times in a batch"):
        actdb.harvest(Fickle(), [{"tokens": [1, 2, 3]}], out, stats=())


def test_hook_points_after_the_unembedding(out: Path) -> None:
    run = actdb.harvest(LateHook(), random_prompts(5), out, store="float32", sites=["hook_final"])
    check_module(run, LateHook(), random_prompts(5))


def test_a_module_in_training_mode(build: Any, bridge: Any, model_folder: Any, out: Path) -> None:
    """Dropout stays out of the values, and the module goes on training."""
    from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module

    model = build("gpt2", resid_pdrop=0.5, attn_pdrop=0.5)
    module = build_bridge_from_module(model, "GPT2LMHeadModel", hf_config=model.config, model_name="g")
    module.train()
    model.train()
    run = actdb.harvest(module, PROMPTS, out, store="float32")
    check_run(run, bridge("gpt2"))
    assert model.training
    assert model.transformer.h[0].attn.attn_dropout.training


# Tokenizers.


def word_tokenizer(side: str) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {f"w{i}": i for i in range(D_VOCAB - 2)} | {"<s>": D_VOCAB - 2, "<p>": D_VOCAB - 1}
    backend = Tokenizer(models.WordLevel(words, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", pad_token="<p>", padding_side=side)


@pytest.mark.parametrize("kind", ["gpt2", "llama", "bert"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_side_of_the_tokenizer_does_not_matter(
    build: Any, bridge: Any, tmp_path: Path, kind: str, side: str
) -> None:
    folder, out = tmp_path / "model", tmp_path / "x.actdb"
    build(kind).save_pretrained(folder)
    word_tokenizer(side).save_pretrained(folder)
    texts = ["w1 w2 w3", "w4", "w5 w6 w7 w8 w9 w1 w1"]
    ids = [[D_VOCAB - 2, *(int(word[1:]) for word in text.split())] for text in texts]
    run = actdb.harvest(folder, [{"text": text} for text in texts], out, store="float32")
    assert [run.tokens(prompt).tolist() for prompt in range(3)] == ids
    assert run.token_texts(1) == ["<s>", "w4"]
    check_run(run, bridge(kind), ids)
    plain = actdb.harvest(folder, [{"text": text} for text in texts], out, run="plain", bos=False)
    assert plain.tokens(0).tolist() == ids[0][1:]
    assert (run.info.plan["bos"], plain.info.plan["bos"]) == (True, False)


# What is kept: positions, patterns, layers, precision.


def test_last_positions(model_folder: Any, out: Path) -> None:
    keep: dict[str, Any] = {"store": "float32", "batch_tokens": 60}
    for kind in ("gpt2", "bert"):
        whole = actdb.harvest(model_folder(kind), PROMPTS, out, run=f"{kind}-whole", **keep)
        last = actdb.harvest(model_folder(kind), PROMPTS, out, run=f"{kind}-last", positions="last", **keep)
        assert last.info.n_rows == len(PROMPTS)
        for site in ("resid_post", "z"):
            assert np.array_equal(last[site].numpy(), whole[site].sel(pos=-1).numpy())
        for prompt in range(len(PROMPTS)):
            square = whole["pattern"].sel(prompt=prompt).numpy()
            assert np.array_equal(last["pattern"].sel(prompt=prompt).numpy(), square[:, :, -1:])
    with pytest.raises(actdb.SelectionError, match="last position"):
        last["z"].sel(prompt=2, pos=0).numpy()


@pytest.mark.parametrize("kind", ["gpt2", "bert"])
def test_top_patterns(model_folder: Any, out: Path, kind: str) -> None:
    whole = actdb.harvest(model_folder(kind), PROMPTS, out, run="whole", store="float32")
    top = actdb.harvest(model_folder(kind), PROMPTS, out, run="top", store="float32", pattern="topk:3")
    assert "pattern" not in top
    for prompt, n in enumerate(LENGTHS):
        square = whole["pattern"].sel(prompt=prompt).numpy()
        values, keys = (top[f"pattern_{part}"].sel(prompt=prompt).numpy() for part in ("value", "index"))
        assert (values.dtype, keys.dtype) == (np.float32, np.uint16)
        for query in range(n):
            n_keys = query + 1 if kind == "gpt2" else n
            order = np.argsort(-square[:, :, query], axis=-1, kind="stable")[..., : min(3, n_keys)]
            count = order.shape[-1]
            assert np.array_equal(keys[:, :, query, :count], order)
            assert np.array_equal(values[:, :, query, :count], np.take_along_axis(square[:, :, query], order, -1))
            assert (keys[:, :, query, count:] == 2**16 - 1).all()
            assert (values[:, :, query, count:] == 0).all()


def test_top_patterns_of_last_positions(model_folder: Any, out: Path) -> None:
    keep: dict[str, Any] = {"store": "float32", "pattern": "topk:4"}
    every = actdb.harvest(model_folder("gpt2"), PROMPTS, out, run="all", **keep)
    last = actdb.harvest(model_folder("gpt2"), PROMPTS, out, run="last", positions="last", **keep)
    for site in ("pattern_value", "pattern_index"):
        assert np.array_equal(last[site].numpy(), every[site].sel(pos=-1).numpy())


def test_no_patterns(model_folder: Any, out: Path) -> None:
    run = actdb.harvest(model_folder("gpt2"), PROMPTS, out, pattern="none")
    assert run.sites == ("resid_post", "z", "mlp_post")
    for sites in ("pattern", "z,pattern"):
        with pytest.raises(actdb.SettingError, match="--pattern none, but --sites names pattern"):
            actdb.harvest(model_folder("gpt2"), PROMPTS, out, run="both", pattern="none", sites=sites)
    for pattern in ("topk:0", "topk:", "some"):
        with pytest.raises(actdb.SettingError, match=f"--pattern {pattern}: choose full, none or topk:N"):
            actdb.harvest(model_folder("gpt2"), PROMPTS, out, run="both", pattern=pattern)


def test_top_entries_breaks_ties_by_the_lower_key() -> None:
    pattern = torch.tensor([[[[0.25, 0.25, 0.25, 0.25]]]])
    assert top_entries(pattern, 2, values=False).flatten().tolist() == [0, 1]


def test_layers_keep_their_numbers(model_folder: Any, bridge: Any, out: Path) -> None:
    run = actdb.harvest(model_folder("gpt2"), PROMPTS, out, layers=[1], store="float32")
    assert run.layers == (1,)
    check_run(run, bridge("gpt2"))
    with pytest.raises(actdb.SelectionError, match="layer 0: there are layers 1 to 1"):
        run["z"].sel(layer=0)
    with pytest.raises(actdb.SettingError, match="layers 0 to 1"):
        actdb.harvest(model_folder("gpt2"), PROMPTS, out, layers=[2])


@pytest.mark.parametrize(("dtype", "stored", "unused_bits"), [("bfloat16", np.float32, 16), ("float16", np.float16, 0)])
def test_half_precision_models_are_stored_exactly(
    model_folder: Any, bridge: Any, out: Path, dtype: str, stored: type, unused_bits: int
) -> None:
    """Each prompt alone, as the oracle runs it: the same shapes give the same bits."""
    run = actdb.harvest(model_folder("llama"), PROMPTS, out, dtype=dtype, batch_tokens=1)
    assert run["resid_post"].dtype == stored
    check_run(run, bridge("llama", dtype=dtype), tolerance=0)
    batched = actdb.harvest(model_folder("llama"), PROMPTS, out, run="batched", dtype=dtype)
    check_run(batched, bridge("llama", dtype=dtype), tolerance=0.05)
    bits = batched["resid_post"].numpy().view(f"u{np.dtype(stored).itemsize}")
    assert (bits & (2**unused_bits - 1) == 0).all()
    assert run.info.plan["dtype"] == dtype


@pytest.mark.parametrize("precision", [None, 1, 5, 10])
def test_errors_of_storage_are_bounded_and_recorded(model_folder: Any, out: Path, precision: int | None) -> None:
    exact = actdb.harvest(model_folder("gpt2"), PROMPTS, out, run="exact", store="float32")
    kept = actdb.harvest(model_folder("gpt2"), PROMPTS, out, run="kept", precision=precision)
    with actdb.open(out) as db:
        errors = dict(db.sql("SELECT (run, site), max_abs_error FROM sites").fetchall())
    for site in ("resid_post", "z", "mlp_post", "pattern"):
        want, have = (np.concatenate([np.ravel(value) for value in _values(run[site])]) for run in (exact, kept))
        assert have.dtype == np.float16
        n_bits = 10 if precision is None else precision
        assert (have.view(np.uint16) & (2 ** (10 - n_bits) - 1) == 0).all()  # really rounded
        if precision is None:
            assert np.array_equal(have, want.astype(np.float16))
        error = np.abs(have.astype(np.float64) - want)
        spacing = np.maximum(np.abs(want), 2.0**-14) * 2.0**-n_bits
        assert (error <= spacing * (0.5 + 2.0 ** (n_bits - 11))).all()
        assert 0 < error.max() <= errors["kept", site] < 4 * error.max()
        assert errors["exact", site] == 0


def _values(selection: Any) -> list[npt.NDArray[Any]]:
    values = selection.numpy()
    return values if isinstance(values, list) else [values]


def test_precision_of_float32(model_folder: Any, out: Path) -> None:
    exact = actdb.harvest(model_folder("gpt2"), PROMPTS, out, run="exact", store="float32")
    kept = actdb.harvest(model_folder("gpt2"), PROMPTS, out, run="kept", store="float32", precision=7)
    have, want = kept["z"].numpy(), exact["z"].numpy()
    assert (have.view(np.uint32) & 0xFFFF == 0).all()
    assert (np.abs(have - want) <= np.abs(want) * 2.0**-8).all()
    for wrong in (0, 24):
        with pytest.raises(actdb.SettingError, match=f"--precision {wrong}: float32 has 23"):
            actdb.harvest(model_folder("gpt2"), PROMPTS, out, run="wrong", store="float32", precision=wrong)


# Values that cannot be kept.


def test_overflow_names_the_site_and_stores_nothing(build: Any, tmp_path: Path, out: Path) -> None:
    model = build("gpt2")
    with torch.no_grad():
        model.transformer.wte.weight.mul_(1e6)
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(actdb.OverflowingError, match="resid_post of layer 0 .* use --store float32"):
        actdb.harvest(tmp_path / "model", PROMPTS, out)
    assert not out.exists()
    run = actdb.harvest(tmp_path / "model", PROMPTS, out, store="float32")
    assert run.status == "complete"
    assert np.abs(run["resid_post"].numpy()).max() > 65504


def test_overflow_that_the_probe_missed_fails_the_part(out: Path) -> None:
    """Token 5 alone overflows, and no probed prompt (the longest of each length bucket) holds it."""
    module = TinyModel()
    with torch.no_grad():
        module.W_E[5] *= 1e6
    prompts = [{"tokens": [1, 2, 3]}, {"tokens": [1, 5, 3]}]
    with pytest.raises(actdb.OverflowingError, match="resid_post of layer 0 is beyond what float16 holds"):
        actdb.harvest(module, prompts, out, sites=["resid_post"])
    with actdb.open(out) as db:
        assert db.run().status == "partial"
        assert db.verify() == []
        assert db.snapshot.runs["tiny"].parts == ()
    assert not list(out.rglob(".tmp-*"))


@pytest.mark.parametrize("sites", ["resid_post", "pattern", "none"])
@pytest.mark.parametrize("store", ["float16", "float32"])
def test_not_a_number_is_refused(out: Path, sites: str, store: str) -> None:
    module = TinyModel()
    with torch.no_grad():
        module.W_E[5] = torch.nan
    with pytest.raises(actdb.OverflowingError, match="the model itself overflows"):
        actdb.harvest(module, [{"tokens": [1, 5, 3]}], out, sites=sites, store=store)
    if out.exists():
        with actdb.open(out) as db:
            assert db.run().status == "partial"


# Interventions.


def test_interventions_are_stored(bridge: Any, build: Any, out: Path) -> None:
    module = bridge("gpt2")
    name = "blocks.0.attn.hook_z"

    def ablate(z: torch.Tensor, hook: Any) -> torch.Tensor:
        return torch.cat([torch.zeros_like(z[:, :, :1]), z[:, :, 1:]], dim=2)

    hooks = [(name, ablate)]
    for missing in ({}, {"run": "a"}, {"hooks_id": "h"}):
        with pytest.raises(actdb.SettingError, match="hooks_id"):
            actdb.harvest(module, PROMPTS, out, hooks=hooks, **missing)
    with pytest.raises(actdb.SettingError, match="no hook point"):
        actdb.harvest(module, PROMPTS, out, run="a", hooks_id="h", hooks=[("blocks.9.x", ablate)])
    plain = actdb.harvest(module, PROMPTS, out, run="plain", store="float32")
    run = actdb.harvest(module, PROMPTS, out, run="ablated", hooks_id="zero L0H0", hooks=hooks, store="float32")
    assert (run["z"].sel(layer=0, head=0).numpy() == 0).all()
    assert not np.allclose(run["resid_post"].numpy(), plain["resid_post"].numpy(), atol=1e-2)
    check_run(plain, module)  # no hook is left behind
    with module.hooks(fwd_hooks=hooks):
        check_run(run, module)
    assert run.info.plan["hooks_id"] == "zero L0H0"
