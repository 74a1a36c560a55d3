"""Modular arithmetic: models, their trainings and checkpoints, published weights, ablation on a model built by hand."""

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import actdb
from analyses.modular_arithmetic import ablation, existing, model, progress, training
from analyses.modular_arithmetic.fourier import basis, waves
from analyses.modular_arithmetic.grid import Grid
from analyses.modular_arithmetic.planted_circuit import RUN, SITES, planted_model
from analyses.modular_arithmetic.training import Training

TINY: dict[str, Any] = {"modulus": 7, "n_epochs": 30, "every": 15, "seed": 3}
SIZES = {"d_model": 16, "d_mlp": 24}


@pytest.mark.parametrize("modulus", [5, 12])
def test_the_grid_is_every_pair_in_order(modulus: int) -> None:
    ids = model.pair_ids(modulus, equals=True)
    expected = [(a, b, modulus) for a in range(modulus) for b in range(modulus)]
    assert [tuple(row) for row in ids.tolist()] == expected
    assert model.answers(modulus).tolist() == [(a + b) % modulus for a, b, _ in expected]
    assert model.pair_ids(modulus, equals=False).shape == (modulus**2, 2)


def test_the_one_layer_model_is_transformer_lens_own() -> None:
    """The same function as the bridge that transformer-lens builds of the same weights, at the last position."""
    from transformer_lens.config import TransformerBridgeConfig
    from transformer_lens.model_bridge.sources.native import boot

    mine = model.build(model.shape_of("one-layer", **SIZES), 7, seed=1)
    with torch.no_grad():
        for parameter in mine.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)  # biases too
    cfg = TransformerBridgeConfig(
        n_layers=1, n_ctx=3, n_heads=4, d_model=16, d_head=4, d_mlp=24, d_vocab=8, d_vocab_out=7, act_fn="relu",
        normalization_type=None, attention_dir="causal", positional_embedding_type="standard",
    )  # fmt: skip
    bridge = boot(cfg)
    own = dict(bridge.tl_named_parameters())
    weights = dict(mine.named_parameters())
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(weights[name])
    ids = torch.from_numpy(model.pair_ids(7, equals=True))
    torch.testing.assert_close(mine(ids), bridge(ids)[:, -1], rtol=1e-4, atol=1e-5)


def test_the_two_layer_model_looks_both_ways_and_pools() -> None:
    pooled = model.build("pooled", 7, seed=0).eval().requires_grad_(False)
    ids = torch.tensor([[2, 5]])
    seen: dict[str, torch.Tensor] = {}
    with actdb.hooked(pooled, [(name, lambda x, hook, name=name: seen.update({name: x})) for name in (
        "blocks.0.attn.hook_pattern", "ln_final.hook_normalized")]):  # fmt: skip
        logits = pooled(ids)
    assert float(seen["blocks.0.attn.hook_pattern"][0, :, 0, 1].min()) > 0
    mean = seen["ln_final.hook_normalized"].mean(1)
    torch.testing.assert_close(logits, mean @ pooled.unembed.W_U + pooled.unembed.b_U)


@pytest.mark.parametrize("architecture", [*model.SHAPES])
def test_a_stored_model_answers_as_it_did(architecture: str, tmp_path: Path) -> None:
    made = Training(architecture, weight_decay=0.1, train_share=0.6, **TINY)
    found = training.run_training(made, tmp_path / "x.actdb")
    with actdb.open(tmp_path / "x.actdb") as db:
        assert [db.run(name).step for name in found.runs] == [0, 10, 15, 30]
        run = db.run(found.last)
        restored = model.restore(run)
        ids = torch.from_numpy(model.pair_ids(7, equals=restored.shape.equals))
        np.testing.assert_allclose(run["hook_answer"].numpy(), restored(ids).detach(), rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(model.number_embedding(run), model.number_embedding(restored))
        assert model.number_embedding(run).shape == (7, made.shape.d_model)
        assert restored.shape.kind == architecture
        grid = progress.read_predictions(run)
        assert grid.is_trained.tolist() == training.split(made).tolist()
        assert int(grid.is_trained.sum()) == round(0.6 * 49)
        assert db.sql("SELECT count(*) FROM prompts WHERE answer = (a + b) % 7").fetchone() == (49,)


def test_checkpoints_lower_the_loss_of_the_training_pairs(tmp_path: Path) -> None:
    made = Training(train_share=0.5, d_model=16, d_mlp=24, weight_decay=0.0, **{**TINY, "n_epochs": 150})
    found = training.run_training(made, tmp_path / "x.actdb")
    with actdb.open(tmp_path / "x.actdb") as db:
        measures = progress.follow(db, found.runs, seed=0)[1]
    assert measures[-1].train_loss < 0.7 * measures[0].train_loss
    assert measures[0].train_loss == pytest.approx(found.losses[0], rel=1e-4)  # stored is what was trained on
    assert measures[2].step == 15
    assert measures[2].train_loss == pytest.approx(found.losses[15], rel=1e-4)
    whole = (measures[-1].train_loss * 24 + measures[-1].test_loss * 25) / 49  # 0.5 · 49 rounds to 24
    assert measures[-1].loss == pytest.approx(whole, rel=1e-6)


def test_a_longer_training_goes_on_and_ends_as_if_never_stopped(tmp_path: Path) -> None:
    short, long = (Training(d_model=16, d_mlp=24, **{**TINY, "n_epochs": n}) for n in (20, 40))
    state = tmp_path / "state.pt"
    training.run_training(short, tmp_path / "a.actdb", state=state)
    resumed = training.run_training(long, tmp_path / "a.actdb", state=state)
    whole = training.run_training(long, tmp_path / "b.actdb")
    np.testing.assert_array_equal(resumed.losses, whole.losses)
    with actdb.open(tmp_path / "a.actdb") as a, actdb.open(tmp_path / "b.actdb") as b:
        np.testing.assert_array_equal(a.run(resumed.last).weight("W_E"), b.run(whole.last).weight("W_E"))
    other = Training(d_model=16, d_mlp=24, weight_decay=0.5, **TINY)
    with pytest.raises(actdb.SettingError, match="weight_decay differ"):
        training.run_training(other, tmp_path / "c.actdb", state=state)


def test_a_finished_training_is_read_and_not_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    db, made = tmp_path / "x.actdb", Training(d_model=16, d_mlp=24, **TINY)
    found = training.run_training(made, db)

    def never(*args: Any, **options: Any) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(training, "train", never)
    again = training.run_training(made, db)
    assert (again.training, again.runs) == (found.training, found.runs)
    np.testing.assert_array_equal(again.losses, found.losses)
    with pytest.raises(AssertionError):
        training.run_training(Training(d_model=16, d_mlp=24, **{**TINY, "seed": 4}), db)


def test_a_training_ends_where_the_held_out_pairs_are_learnt(tmp_path: Path) -> None:
    made = Training(train_share=1.0, stop_below=0.5, weight_decay=0.0, **{**TINY, "n_epochs": 400})
    found = training.run_training(made, tmp_path / "x.actdb")
    with actdb.open(tmp_path / "x.actdb") as db:
        measures = progress.follow(db, found.runs, seed=0)[1]
    assert measures[-1].step < 400
    assert measures[-1].test_loss < 0.5 <= measures[-2].test_loss


def test_splits_are_seeded_and_of_their_size() -> None:
    first, again, other = (training.split(Training(modulus=11, seed=seed)) for seed in (0, 0, 1))
    assert first.sum() == round(0.3 * 121)
    assert (first == again).all()
    assert (first != other).any()
    with pytest.raises(actdb.SettingError, match="above 0"):
        Training(train_share=0.0)
    with pytest.raises(actdb.SettingError, match="choose one of one-layer"):
        _ = Training("deep").shape


@pytest.fixture(scope="module")
def published() -> model.ModularTransformer:
    made = model.build(model.shape_of("one-layer", **SIZES), 7, seed=5)
    assert isinstance(made, model.ModularTransformer)
    return made.eval()


def original_layout(made: model.ModularTransformer) -> dict[str, torch.Tensor]:
    """The names and layouts of the first published grokked models: matrices turned, no biases in attention, a mask."""
    state = {name: value.clone() for name, value in made.state_dict().items()}
    block = "blocks.0"
    kept = {
        "embed.W_E": state["embed.W_E"].T,
        "pos_embed.W_pos": state["pos_embed.W_pos"],
        "unembed.W_U": torch.cat([state["unembed.W_U"], torch.ones(16, 1)], 1),  # an output for `=` too
        f"{block}.mlp.b_in": state[f"{block}.mlp.b_in"],
        f"{block}.mlp.b_out": state[f"{block}.mlp.b_out"],
        f"{block}.mlp.W_in": state[f"{block}.mlp.W_in"].T,
        f"{block}.mlp.W_out": state[f"{block}.mlp.W_out"].T,
        f"{block}.attn.W_O": state[f"{block}.attn.W_O"].reshape(16, 16).T,
        f"{block}.attn.mask": torch.tril(torch.ones(3, 3)),
    }
    return kept | {f"{block}.attn.W_{k}": state[f"{block}.attn.W_{k}"].transpose(1, 2) for k in "QKV"}


def test_published_weights_are_read_in_every_layout(published: model.ModularTransformer, tmp_path: Path) -> None:
    state = {name: value.contiguous() for name, value in published.state_dict().items()}
    save_file(state, tmp_path / "step300.safetensors")
    torch.save(state, tmp_path / "plain.pt")
    torch.save(original_layout(published), tmp_path / "old.pth")
    folder = tmp_path / "steps"
    folder.mkdir()
    for step in (5, 100, 20):
        torch.save(state, folder / f"step{step}.pt")
    ids = torch.from_numpy(model.pair_ids(7, equals=True))
    for name, steps in (
        ("step300.safetensors", [300]),
        ("plain.pt", [None]),
        ("old.pth", [None]),
        ("steps", [5, 20, 100]),
    ):
        found = existing.read_published(tmp_path / name)
        assert [checkpoint.step for checkpoint in found.checkpoints] == steps
        assert found.modulus == 7
        torch.testing.assert_close(found.model(found.checkpoints[-1])(ids), published(ids))


def test_a_published_training_is_harvested_checkpoint_by_checkpoint(
    published: model.ModularTransformer, tmp_path: Path
) -> None:
    state = published.state_dict()
    trained = torch.arange(0, 49, 3)
    content = {"model": state, "checkpoints": [state, state], "checkpoint_epochs": [0, 100], "train_indices": trained}
    torch.save(content, tmp_path / "grokking.pth")
    found = existing.read_published(tmp_path / "grokking.pth")
    names = existing.harvest_published(found, tmp_path / "x.actdb")
    assert names == ("grokking-step0", "grokking-step100")
    with actdb.open(tmp_path / "x.actdb") as db:
        grid = progress.read_predictions(db.run(names[1]))
        assert np.flatnonzero(grid.is_trained).tolist() == trained.tolist()
        ids = torch.from_numpy(model.pair_ids(7, equals=True))
        np.testing.assert_allclose(grid.logits, published(ids).detach(), rtol=1e-4, atol=1e-5)


class Harmful:
    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("harmed"),)


def test_nothing_but_tensors_is_unpickled(
    published: model.ModularTransformer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"model": published.state_dict(), "other": Harmful()}, tmp_path / "bad.pt")
    with pytest.raises(actdb.ModelError, match="more than tensors"):
        existing.read_published(tmp_path / "bad.pt")
    assert not (tmp_path / "harmed").exists()


def test_a_configuration_object_in_the_file_is_not_in_the_way(
    published: model.ModularTransformer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Published files hold an object of a class that today's transformer-lens no longer has."""
    name = existing.CONFIGURATION.rpartition(".")[0]
    module: Any = ModuleType(name)
    module.HookedTransformerConfig = type("HookedTransformerConfig", (), {"__module__": name})
    cfg = module.HookedTransformerConfig()
    cfg.d_model, cfg.dtype = 16, torch.float32
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, name, module)
        torch.save({"model": published.state_dict(), "config": cfg}, tmp_path / "with_config.pth")
    assert existing.read_published(tmp_path / "with_config.pth").modulus == 7


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"weights": torch.ones(2)}, "no state dict with embed.W_E"),
        ([1, 2], "holds a list"),
        ({"embed.W_E": torch.ones(8, 4)}, "has no pos_embed.W_pos"),
    ],
)
def test_files_of_other_things_are_told_apart(content: Any, message: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(actdb.ModelError, match=message):
        existing.read_published(tmp_path / "x.pt")
    (tmp_path / "y.pt").write_bytes(b"nothing")
    with pytest.raises(actdb.ModelError, match="no PyTorch file"):
        existing.read_published(tmp_path / "y.pt")
    with pytest.raises(actdb.ModelError, match="no such file"):
        existing.read_published(tmp_path / "z.pt")


@pytest.fixture(scope="module")
def planted_grid(tmp_path_factory: pytest.TempPathFactory) -> Grid:
    """The model that adds with head 0 of two, and its run."""
    made = planted_model(7, working=0)
    path = tmp_path_factory.mktemp("planted") / "x.actdb"
    sites = (*SITES, "attn_out", "hook_pos_embed")
    prompts = training.grid_prompts(Training(modulus=7))
    run = actdb.harvest(made, prompts, out=path, run=RUN, sites=sites, stats=(), store="float32")
    return Grid(made, run, 7)


def test_only_the_component_that_works_is_worth_something(planted_grid: Grid) -> None:
    effects = ablation.ablate(planted_grid)
    for kind in ("zero", "mean"):
        falls = {name: effect.fall.value for name, effect in effects[kind].items()}
        assert falls["head 0.1"] == 0
        assert falls["positions"] == 0
        for name in ("embed", "attention 0", "MLP 0", "head 0.0"):
            assert falls[name] > 0.8, (kind, name)
    assert effects["mean"]["head 0.0"].rise.low > 1
    patched = ablation.patch(planted_grid, seed=0)
    assert patched["shifted"]["embed"].carried == 1.0  # the answer is that of the pair patched in
    assert patched["shifted"]["head 0.0"].carried == 1.0
    assert patched["random"]["head 0.1"].carried == 0.0
    assert patched["random"]["head 0.1"].fall.value == 0


def test_directions_over_the_numbers_are_taken_out_of_the_embedding(planted_grid: Grid) -> None:
    p = planted_grid.modulus
    hook, function = ablation.without(planted_grid, waves(p, (2,)))
    seen: list[torch.Tensor] = []
    planted_grid.logits([(hook, function), (hook, lambda x, hook: seen.append(x))])
    numbers = seen[0][:, 0].reshape(p, p, -1)[:, 0].double()  # [a, d_model]
    left = torch.from_numpy(np.array(basis(p))) @ numbers
    table = torch.from_numpy(np.array(basis(p))) @ planted_grid.run.torch_weight("W_E")[:p].double()
    torch.testing.assert_close(left[[0, 1, 2, 5, 6]], table[[0, 1, 2, 5, 6]], atol=1e-6, rtol=0)
    assert float(left[[3, 4]].abs().max()) < 1e-6
    found = ablation.ablate_directions(planted_grid, (1, 2, 3), seed=0)  # all of them
    assert found.clean == 1.0
    assert found.key < 0.3
    assert found.only_key == 1.0
    assert np.isnan(found.others.value)


def test_the_loss_is_exact_where_float32_has_none() -> None:
    logits = torch.tensor([[40.0, 0.0, 0.0]])
    loss = float(training.answer_loss(logits, torch.tensor([0])))
    assert loss == pytest.approx(2 * np.exp(-40.0), rel=1e-6)
