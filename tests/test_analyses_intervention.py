"""Interventions with sources from the database, held to edited weights, hand-made activations and transformer-lens."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hooked import TinyModel
from transformer_lens import patching

import actdb
from analyses.common import intervention
from analyses.common.intervention import (
    Place,
    Route,
    components,
    effects,
    logits_of,
    mean_ablation,
    patch_from,
    path_patch,
    place,
    replace,
    resample_ablation,
    stored,
    stored_mean,
    zero_ablation,
)

N_PROMPTS, N_POS = 6, 5
SITES = ("resid_post", "z", "pattern", "mlp_post")


def see(seen: dict[str, torch.Tensor], name: str, tensor: torch.Tensor, hook: Any) -> None:
    seen[name] = tensor


@pytest.fixture(scope="module")
def model() -> TinyModel:
    return TinyModel(n_layers=3)


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return torch.randint(0, 16, (N_PROMPTS, N_POS), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def run(model: TinyModel, ids: torch.Tensor, tmp_path_factory: pytest.TempPathFactory) -> actdb.Run:
    out = tmp_path_factory.mktemp("intervention") / "x.actdb"
    return actdb.harvest(model, [{"tokens": row} for row in ids.tolist()], out=out, sites=SITES, store="float32")


def test_zeroing_a_head_is_zeroing_its_output_weights(model: TinyModel, ids: torch.Tensor, run: actdb.Run) -> None:
    found = logits_of(model, ids, [zero_ablation(place(run, "z", layer=1, head=1))])
    edited = TinyModel(n_layers=3)
    edited.blocks[1].attn.W_O.data[1] = 0
    torch.testing.assert_close(found, edited(ids).detach())
    assert not torch.allclose(found, logits_of(model, ids))


def test_a_patch_of_the_last_residual_is_the_other_prompts_output(
    model: TinyModel, ids: torch.Tensor, run: actdb.Run
) -> None:
    clean = logits_of(model, ids)
    turned = [*range(1, N_PROMPTS), 0]
    found = logits_of(model, ids, [patch_from(run, "resid_post", prompts=turned, layer=2)])
    torch.testing.assert_close(found, clean[turned])
    at_last = logits_of(model, ids, [patch_from(run, "resid_post", prompts=turned, layer=2, pos=-1)])
    torch.testing.assert_close(at_last[:, -1], clean[turned][:, -1])
    torch.testing.assert_close(at_last[:, :-1], clean[:, :-1])


def test_a_patch_of_itself_changes_nothing(model: TinyModel, ids: torch.Tensor, run: actdb.Run) -> None:
    clean = logits_of(model, ids)
    for site, parts in {"z": {"head": 0}, "mlp_post": {"neuron": [1, 3]}, "pattern": {"head": 1, "pos": 2}}.items():
        found = logits_of(model, ids, [patch_from(run, site, prompts=range(N_PROMPTS), layer=1, **parts)])
        torch.testing.assert_close(found, clean)


def test_a_place_is_the_part_it_names(model: TinyModel, ids: torch.Tensor, run: actdb.Run) -> None:
    seen: dict[str, torch.Tensor] = {}
    sevens = {
        "blocks.0.mlp.hook_post": (Place("blocks.0.mlp.hook_post", neuron=[2, -1], pos=1), (slice(None), 1, [2, -1])),
        "blocks.1.attn.hook_z": (Place("blocks.1.attn.hook_z", head=1, neuron=0), (slice(None), slice(None), 1, 0)),
        "blocks.2.attn.hook_pattern": (
            Place("blocks.2.attn.hook_pattern", head=0, pos=slice(2, 4)),
            (slice(None), 0, slice(2, 4)),
        ),
    }
    for name, (at, where) in sevens.items():
        logits_of(model, ids, [replace(at, 7.0), (name, partial(see, seen, name))])
        expected = stored(run, name, range(N_PROMPTS)) if name.startswith("blocks.0") else None
        changed = seen[name].clone()
        assert (changed[where] == 7).all()
        changed[where] = 0
        assert not (changed == 7).any()
        if expected is not None:
            expected[where] = 0
            torch.testing.assert_close(changed, expected)


def test_mean_ablation_takes_the_mean_of_stored_rows(model: TinyModel, ids: torch.Tensor, run: actdb.Run) -> None:
    values = run["z"].sel(layer=1).numpy().reshape(2, N_PROMPTS, N_POS, 4)  # [head, prompt, pos, d_head]
    torch.testing.assert_close(stored_mean(run, "z", layer=1), torch.from_numpy(values.mean((1, 2))))
    by_pos = stored_mean(run, "z", layer=1, by_pos=True)  # [pos, head, d_head]
    torch.testing.assert_close(by_pos, torch.from_numpy(np.moveaxis(values.mean(1), 0, 1)))
    found = logits_of(model, ids, [mean_ablation(run, "z", layer=1, by_pos=True, head=0)])
    by_hand = stored(run, "blocks.1.attn.hook_z", range(N_PROMPTS))
    by_hand[:, :, 0] = by_hand[:, :, 0].mean(0)
    torch.testing.assert_close(found, logits_of(model, ids, [("blocks.1.attn.hook_z", lambda tensor, hook: by_hand)]))


def test_means_of_ragged_prompts_count_the_prompts_that_have_a_position(tmp_path: Path) -> None:
    prompts = [{"tokens": list(range(n))} for n in (2, 4, 3)]
    ragged = actdb.harvest(TinyModel(), prompts, out=tmp_path / "x.actdb", sites=["mlp_post"], store="float32")
    values = ragged["mlp_post"].sel(layer=1)
    rows, pos = values.numpy(), values.pos
    expected = np.stack([rows[pos == p].mean(0) for p in range(4)])
    np.testing.assert_allclose(stored_mean(ragged, "mlp_post", layer=1, by_pos=True), expected, rtol=1e-5)


def test_resampling_takes_another_prompt_of_the_same_length(
    model: TinyModel, ids: torch.Tensor, run: actdb.Run
) -> None:
    hook, function = resample_ablation(run, "resid_post", prompts=range(N_PROMPTS), seed=0, layer=2)
    own = stored(run, hook, range(N_PROMPTS))
    drawn = function(torch.zeros_like(own), None)
    for prompt, values in enumerate(drawn):
        others = [p for p in range(N_PROMPTS) if torch.equal(own[p], values)]
        assert others
        assert prompt not in others


def test_resampling_without_another_is_refused(tmp_path: Path) -> None:
    lone = actdb.harvest(TinyModel(), [{"tokens": [1]}, {"tokens": [1, 2]}], out=tmp_path / "x.actdb")
    with pytest.raises(actdb.SelectionError, match="only one of its length"):
        resample_ablation(lone, "z", prompts=[0], seed=0, layer=0)


def test_effects_are_differences_from_the_clean_run(model: TinyModel, ids: torch.Tensor, run: actdb.Run) -> None:
    hooks = {"none": [], "head": [zero_ablation(place(run, "z", layer=0, head=0))]}
    found = effects(model, ids, hooks, lambda logits: logits[:, -1, 3])
    assert (found["none"] == 0).all()
    expected = logits_of(model, ids, hooks["head"])[:, -1, 3] - logits_of(model, ids)[:, -1, 3]
    torch.testing.assert_close(found["head"], expected)


def test_nothing_stays_on_the_model(model: TinyModel, ids: torch.Tensor, run: actdb.Run) -> None:
    clean = logits_of(model, ids)
    with pytest.raises(ZeroDivisionError):
        logits_of(model, ids, [("blocks.0.attn.hook_z", lambda tensor, hook: 1 / 0)])
    torch.testing.assert_close(logits_of(model, ids), clean)
    assert not any(part.fwd_hooks for part in model.modules() if hasattr(part, "fwd_hooks"))
    with pytest.raises(actdb.SettingError, match="hook_nowhere"), actdb.hooked(model, [("hook_nowhere", print)]):
        pass
    with pytest.raises(actdb.ModelError, match="no hook points"), actdb.hooked(torch.nn.Linear(1, 1), []):
        pass


def test_sites_that_are_not_stored_are_named(run: actdb.Run) -> None:
    with pytest.raises(actdb.SiteError, match="no site 'mlp_out'; it holds resid_post"):
        place(run, "mlp_out", layer=0)
    with pytest.raises(actdb.SelectionError, match="has no heads"):
        replace(Place("blocks.0.mlp.hook_post", head=0), 0.0)[1](torch.zeros(1, 2, 3), None)


@pytest.fixture(scope="module")
def harvested(
    bridge: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Any, actdb.Run, torch.Tensor]:
    """A GPT-2 bridge with all components of twelve prompts stored."""
    ids = torch.randint(3, 48, (12, 7), generator=torch.Generator().manual_seed(0))
    made = bridge("gpt2")
    prompts = [{"tokens": row} for row in ids.tolist()]
    out = tmp_path_factory.mktemp("bridge") / "x.actdb"
    sites = ["resid_post", "z", "mlp_out", "resid_pre", "attn_out"]
    return made, actdb.harvest(made, prompts, out=out, run="gpt2", sites=sites, store="float32"), ids


def test_patching_a_bridge_is_transformer_lens_own(harvested: tuple[Any, actdb.Run, torch.Tensor]) -> None:
    bridge, run, ids = harvested
    source, target = list(range(6)), list(range(6, 12))

    def metric(logits: torch.Tensor) -> torch.Tensor:
        return logits[:, -1, 5].mean() - logits[:, -1, 9].mean()

    with torch.inference_mode():
        expected = patching.get_act_patch_attn_head_out_all_pos(
            bridge, ids[target], run.activation_cache(source), metric
        )
    for layer, head in np.ndindex(2, 4):
        hook = patch_from(run, "z", prompts=source, layer=layer, head=head)
        found = metric(logits_of(bridge, ids[target], [hook]))
        assert float(found) == pytest.approx(float(expected[layer, head]), abs=1e-4)


def test_path_patching_is_transformer_lens_direct_path(harvested: tuple[Any, actdb.Run, torch.Tensor]) -> None:
    bridge, run, ids = harvested
    source, target = list(range(6)), list(range(6, 12))
    frozen = components(run, target)

    def metric(logits: torch.Tensor) -> torch.Tensor:
        return logits[:, -1, 5].mean() - logits[:, -1, 9].mean()

    for head in range(2):
        with torch.inference_mode():
            expected = patching.get_act_patch_direct_path(
                bridge,
                ids[target],
                run.activation_cache(source),
                run.activation_cache(target),
                metric,
                src_layer=0,
                src_head=head,
                component="q",
                verbose=False,
            )
        sender = patch_from(run, "z", prompts=source, layer=0, head=head)
        for other in range(4):
            route = Route(sender, [Place("blocks.1.attn.hook_q", head=other)], frozen)
            found = metric(path_patch(bridge, ids[target], route))
            assert float(found) == pytest.approx(float(expected[1, other]), abs=1e-4)


def test_the_direct_path_to_the_output_is_the_heads_own_write(harvested: tuple[Any, actdb.Run, torch.Tensor]) -> None:
    bridge, run, ids = harvested
    source, target = list(range(6)), list(range(6, 12))
    route = Route(
        patch_from(run, "z", prompts=source, layer=0, head=2),
        [Place("blocks.1.hook_resid_post")],
        components(run, target),
    )
    found = path_patch(bridge, ids[target], route)
    name = "blocks.0.attn.hook_z"
    change = (stored(run, name, source) - stored(run, name, target))[:, :, 2] @ run.torch_weight("W_O", layer=0, head=2)
    residual = stored(run, "blocks.1.hook_resid_post", target) + change
    expected = logits_of(bridge, ids[target], [replace(Place("blocks.1.hook_resid_post"), residual)])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_interventions_can_be_harvested(model: TinyModel, ids: torch.Tensor, run: actdb.Run, tmp_path: Path) -> None:
    hook = zero_ablation(place(run, "z", layer=0, head=1))
    prompts = [{"tokens": row} for row in ids.tolist()]
    made = actdb.harvest(
        model,
        prompts,
        out=tmp_path / "x.actdb",
        run="zeroed",
        hooks=[hook],
        hooks_id="zero-0.1",
        sites=["resid_post"],
        store="float32",
    )
    last = torch.from_numpy(np.array(made["resid_post"].sel(layer=2).numpy())).reshape(N_PROMPTS, N_POS, -1)
    torch.testing.assert_close(last @ model.W_E.detach().T, logits_of(model, ids, [hook]), rtol=1e-4, atol=1e-4)


def test_hook_names_come_from_the_run(run: actdb.Run) -> None:
    assert intervention.hook_name(run, "mlp_post", layer=2) == "blocks.2.mlp.hook_post"
