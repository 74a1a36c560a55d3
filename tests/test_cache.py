"""`activation_cache`: a TransformerLens notebook gets from stored activations what `run_with_cache` gives it."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hooked import TinyModel, random_prompts
from transformer_lens import ActivationCache

import actdb

KINDS = ("gpt2", "llama", "native-mlp")
PROMPTS = [
    {"tokens": np.random.default_rng(n).integers(3, 48, length).tolist()} for n, length in enumerate((7, 9, 9, 3, 1))
]
SITES = "embed,resid_pre,resid_mid,resid_post,attn_out,mlp_out,mlp_post,q,k,v,z,pattern,ln_final,ln1.hook_scale"
NOTEBOOK: Mapping[str, Callable[[Any], torch.Tensor]] = {
    "pattern": lambda cache: cache["pattern", 1],
    "last layer": lambda cache: cache["resid_post", -1],
    "short name": lambda cache: cache["k1"],
    "whole name": lambda cache: cache["blocks.0.mlp.hook_post"],
    "stack_activation": lambda cache: cache.stack_activation("pattern"),
    "accumulated_resid": lambda cache: cache.accumulated_resid(incl_mid=True),
    "accumulated_resid normalised": lambda cache: cache.accumulated_resid(apply_ln=True, pos_slice=-1),
    "decompose_resid": lambda cache: cache.decompose_resid(apply_ln=True),
    "stack_head_results": lambda cache: cache.stack_head_results(layer=-1, pos_slice=-1, incl_remainder=True),
    "stack_head_results normalised": lambda cache: cache.stack_head_results(apply_ln=True),
    "neurons": lambda cache: cache.stack_neuron_results(1, pos_slice=-1),
    "get_full_resid_decomposition": lambda cache: cache.get_full_resid_decomposition(expand_neurons=False),
    "logit_attrs": lambda cache: cache.logit_attrs(cache.stack_head_results(pos_slice=-1), tokens=5, pos_slice=-1),
    "logit_attrs of pairs": lambda cache: cache.logit_attrs(
        cache.decompose_resid(), tokens=torch.tensor([[5] * 9, [6] * 9]), incorrect_tokens=torch.tensor([[7] * 9] * 2)
    ),
}


@pytest.fixture(scope="module")
def runs(model_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, actdb.Run]:
    out = tmp_path_factory.mktemp("cache") / "x.actdb"
    return {kind: actdb.harvest(model_folder(kind), PROMPTS, out, sites=SITES, store="float32") for kind in KINDS}


def reference(model: Any, prompts: list[int]) -> ActivationCache:
    with torch.no_grad():
        _, cache = model.run_with_cache(torch.tensor([PROMPTS[prompt]["tokens"] for prompt in prompts]))
    return cache  # type: ignore[no-any-return]


def near(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    return found.shape == wanted.shape and torch.allclose(found, wanted, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_every_activation_is_that_of_run_with_cache(runs: Any, bridge: Any, kind: str) -> None:
    cache = runs[kind].activation_cache([1, 2])
    wanted = reference(bridge(kind), [1, 2])
    stored = {name for site in runs[kind].info.sites for name in _hook_names(site)}
    assert stored <= set(cache.keys())
    assert "ln_final.hook_scale" in cache.keys()  # made of the last resid_post  # noqa: SIM118
    for name, value in cache.items():
        assert value.dtype == torch.float32
        assert near(value, wanted[name]), name


def _hook_names(site: Any) -> list[str]:
    return [f"blocks.{layer}.{site.hook}" for layer in site.layers] or [site.hook]


@pytest.mark.parametrize("call", NOTEBOOK)
@pytest.mark.parametrize("with_model", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_notebook_works_on_the_database(runs: Any, bridge: Any, kind: str, with_model: bool, call: str) -> None:
    cache = runs[kind].activation_cache([1, 2], model=bridge(kind) if with_model else None)
    with torch.no_grad():
        assert near(NOTEBOOK[call](cache), NOTEBOOK[call](reference(bridge(kind), [1, 2])))


def test_one_prompt_without_its_batch_axis(runs: Any, bridge: Any) -> None:
    cache = runs["gpt2"].activation_cache(0)
    assert cache["resid_post", 0].shape == (1, 7, 24)
    cache.remove_batch_dim()
    wanted = reference(bridge("gpt2"), [0]).remove_batch_dim()
    assert near(cache["resid_post", 0], wanted["resid_post", 0])
    assert near(cache.stack_head_results(), wanted.stack_head_results())
    assert cache.to("cpu")["pattern", 0].shape == (4, 7, 7)


def test_only_what_is_asked_for_is_read_and_once(runs: Any) -> None:
    run = actdb.open(runs["llama"]._folder.root).run(runs["llama"].name)
    cache = run.activation_cache(1)
    _ = len(cache), list(cache), "blocks.0.attn.hook_z" in cache.keys(), repr(cache)  # noqa: SIM118
    readers = {site: run.source(site).reader for site in run.sites}
    assert {reader.n_reads for reader in readers.values()} == {0}
    _ = cache["z", 1]
    once = readers["z"].n_reads
    assert once > 0
    cache["z", 1][:] = 7
    assert (cache["z", 1] == 7).all()  # what a notebook changes stays
    assert readers["z"].n_reads == once
    assert {reader.n_reads for site, reader in readers.items() if site != "z"} == {0}
    assert not (run.activation_cache(1)["z", 1] == 7).any()  # in this cache alone


def test_what_a_cache_cannot_give(runs: Any, tmp_path: Path) -> None:
    run = runs["gpt2"]
    with pytest.raises(
        KeyError,
        match=r"run 'gpt2' does not store 'blocks\.0\.hook_nope'; it holds embed, .*--sites embed,.*,hook_nope",
    ):
        run.activation_cache(0)["blocks.0.hook_nope"]
    with pytest.raises(actdb.SelectionError, match="prompts of 7 to 9 tokens; a batch holds prompts of one length"):
        run.activation_cache([0, 1])
    with pytest.raises(actdb.SelectionError, match="no prompt given"):
        run.activation_cache([])
    with pytest.raises(actdb.SelectionError):
        run.activation_cache(5)
    with pytest.raises(actdb.SettingError, match="dtype 'int8'; choose one of float16"):
        run.activation_cache(0, dtype="int8")
    with pytest.raises(actdb.SelectionError, match="needs the model; give activation_cache"):
        run.activation_cache(0).logit_lens()
    bare = actdb.harvest(TinyModel(), random_prompts(3), tmp_path / "x.actdb")
    with pytest.raises(KeyError, match=r"'blocks\.0\.mlp\.hook_pre'; it holds .* --sites resid_post,.*,mlp_pre$"):
        bare.activation_cache(0)["mlp_pre", 0]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_the_dtype_asked_for(runs: Any, dtype: str) -> None:
    run = runs["llama"]
    cache = run.activation_cache(1, dtype=dtype)
    assert cache["resid_post", 0].dtype == getattr(torch, dtype)
    stored = torch.from_numpy(run["resid_post"].sel(layer=0, prompt=1).numpy())
    assert torch.equal(cache["resid_post", 0][0], stored.to(getattr(torch, dtype)))


def test_last_positions_and_top_patterns(tmp_path: Path, bridge: Any, model_folder: Any) -> None:
    options = {"sites": "embed,resid_post,pattern", "store": "float32", "positions": "last"}
    run = actdb.harvest(model_folder("gpt2"), PROMPTS, tmp_path / "x.actdb", run="last", **options)
    cache, wanted = run.activation_cache([1, 2]), reference(bridge("gpt2"), [1, 2])
    assert near(cache["resid_post", 1], wanted["resid_post", 1][:, -1:])
    assert near(cache["pattern", 0], wanted["pattern", 0][:, :, -1:])
    assert near(cache["pos_embed"], wanted["pos_embed"][:, -1:])
    top = actdb.harvest(model_folder("gpt2"), PROMPTS, tmp_path / "x.actdb", run="top", pattern="topk:2")
    with pytest.raises(KeyError, match="does not store 'blocks.0.attn.hook_pattern'"):
        top.activation_cache(0)["pattern", 0]


def test_imported_activations_come_back(tmp_path: Path, bridge: Any) -> None:
    wanted = reference(bridge("gpt2"), [1, 2])
    torch.save({name: value for name, value in wanted.items() if name.startswith("blocks.")}, tmp_path / "c.pt")
    run = actdb.import_activations(tmp_path / "c.pt", PROMPTS[1:3], tmp_path / "x.actdb")
    cache = run.activation_cache([0, 1])
    for name, value in cache.items():
        assert torch.equal(value, wanted[name]), name
    assert near(cache.accumulated_resid(), wanted.accumulated_resid())
    with pytest.raises(actdb.SelectionError, match=r"give activation_cache\(…, model=…\) the model itself"):
        cache.stack_head_results()
    with pytest.raises(actdb.SelectionError, match="the norms of c are not recorded; give activation_cache"):
        cache.accumulated_resid(apply_ln=True)
    given = run.activation_cache([0, 1], model=bridge("gpt2"))
    assert near(given.stack_head_results(), wanted.stack_head_results())
    assert near(given.accumulated_resid(apply_ln=True), wanted.accumulated_resid(apply_ln=True))
