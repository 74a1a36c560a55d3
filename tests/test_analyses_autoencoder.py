"""The sparse autoencoder: sparse features that were planted are found again, and reading hardly takes time."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformer_lens.hook_points import HookPoint

import actdb
from analyses.common.autoencoder import (
    GatedAutoencoder,
    SparseAutoencoder,
    explained_variance,
    top_k,
    train_autoencoder,
    train_gated,
)
from analyses.semantic_head.feature import compare_features, encode_tokens

N_FEATURES, D_MODEL, N_ACTIVE = 48, 24, 3


class Sparse(nn.Module):
    """A "model" whose residual stream is a sparse sum of known directions: token t is the t-th draw of features."""

    def __init__(self, n_rows: int) -> None:
        super().__init__()
        self.cfg = SimpleNamespace(
            model_name="sparse", n_layers=1, n_heads=1, d_model=D_MODEL, d_vocab=n_rows, n_ctx=64
        )
        generator = torch.Generator().manual_seed(0)
        self.directions = nn.functional.normalize(torch.randn(N_FEATURES, D_MODEL, generator=generator), dim=1)
        active = torch.rand(n_rows, N_FEATURES, generator=generator).topk(N_ACTIVE, dim=1).indices
        strength = 1 + torch.rand(n_rows, N_ACTIVE, generator=generator)
        codes = torch.zeros(n_rows, N_FEATURES).scatter(1, active, strength)
        self.W_E = nn.Parameter(codes @ self.directions)
        self.blocks = nn.ModuleList([nn.Module()])
        self.blocks[0].hook_resid_post = HookPoint()

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.blocks[0].hook_resid_post(self.W_E[ids])  # type: ignore[operator]
        return out


@pytest.fixture(scope="module")
def model() -> Sparse:
    return Sparse(8192)


@pytest.fixture(scope="module")
def rows(model: Sparse, tmp_path_factory: pytest.TempPathFactory) -> Any:
    tokens = np.arange(8192).reshape(128, 64)
    out = tmp_path_factory.mktemp("sparse") / "x.actdb"
    prompts = [{"tokens": row.tolist()} for row in tokens]
    run = actdb.harvest(model, prompts, out=out, sites=("resid_post",), store="float32")
    return run["resid_post"].sel(layer=0)


def test_planted_features_are_found(model: Sparse, rows: Any) -> None:
    trained = train_autoencoder(rows, n_latents=64, k=N_ACTIVE, epochs=40, seed=0, batch_rows=256)
    assert trained.n_rows == 8192
    assert len(trained.losses) == 40 * 32
    assert trained.losses[-1] < 0.2 * trained.losses[0]
    assert explained_variance(trained.model, rows.numpy()) > 0.8
    columns = trained.model.decoder.detach()
    torch.testing.assert_close(columns.norm(dim=1), torch.ones(64))
    found = (model.directions @ columns.T).max(1).values
    assert (found > 0.9).float().mean() > 0.75
    latents = encode_tokens(trained.model, rows.numpy()[:500])
    assert ((latents > 0).sum(1) <= N_ACTIVE).all()
    assert trained.compute_share >= 0.8


def test_a_seed_gives_the_same_autoencoder(rows: Any) -> None:
    first, second = (train_autoencoder(rows, n_latents=16, k=2, epochs=1, seed=3) for _ in range(2))
    torch.testing.assert_close(first.model.decoder, second.model.decoder, rtol=0, atol=0)
    other = train_autoencoder(rows, n_latents=16, k=2, epochs=1, seed=4)
    assert not torch.equal(first.model.decoder, other.model.decoder)


class HalfAsleep(SparseAutoencoder):
    """Begins with an encoder that reads next to nothing for two thirds of its latents: TopK never chooses them."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        with torch.no_grad():
            self.encoder[:, len(self.decoder) // 3 :] *= 1e-3


def test_dead_latents_come_back(rows: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("analyses.common.autoencoder.SparseAutoencoder", HalfAsleep)
    monkeypatch.setattr("analyses.common.autoencoder.DEAD_AFTER_ROWS", 1000)
    revived = train_autoencoder(rows, n_latents=72, k=N_ACTIVE, epochs=12, seed=0, batch_rows=256)
    monkeypatch.setattr("analyses.common.autoencoder.AUXILIARY_WEIGHT", 0.0)
    asleep = train_autoencoder(rows, n_latents=72, k=N_ACTIVE, epochs=12, seed=0, batch_rows=256)
    assert asleep.n_dead > 40  # the features are 48
    assert revived.n_dead < 25
    assert explained_variance(revived.model, rows.numpy()) > explained_variance(asleep.model, rows.numpy()) + 0.1


def test_top_k_keeps_the_largest_above_zero() -> None:
    values = torch.tensor([[3.0, -1.0, 2.0, 1.0], [-1.0, -2.0, -3.0, 0.5]])
    assert top_k(values, 2).tolist() == [[3.0, 0.0, 2.0, 0.0], [0.0, 0.0, 0.0, 0.5]]
    with pytest.raises(actdb.SettingError, match="k 5: choose 1 to the number of latents, 4"):
        SparseAutoencoder(3, 4, 5, seed=0)


def test_decoding_undoes_the_scale() -> None:
    model = SparseAutoencoder(6, 6, 6, seed=0)
    with torch.no_grad():
        model.scale.fill_(4.0)
        model.decoder.copy_(torch.eye(6))
        model.encoder.copy_(torch.eye(6))
    given = torch.rand(5, 6) + 0.1
    torch.testing.assert_close(model(given), given)
    assert explained_variance(model, given.numpy()) == pytest.approx(1.0, abs=1e-5)


def test_features_of_categories_are_told_from_chance() -> None:
    labels = np.repeat(np.arange(4), 10)
    generator = np.random.default_rng(0)
    noise = (generator.random((40, 12)) < 0.2) * generator.random((40, 12))
    latents = np.concatenate([np.eye(4)[labels], noise], 1).astype(np.float32)
    scores = (labels[:, None] == labels[None]) + generator.normal(0, 0.1, (40, 40))
    found = compare_features(latents, scores, labels, n_permutations=49, seed=0)
    assert found.overlap_p == found.correlation_p == pytest.approx(0.02)
    assert found.overlap > 0.3 > abs(found.null_overlap)
    assert found.purity > found.null_purity + 0.1
    chance = compare_features(noise.astype(np.float32), scores, labels, n_permutations=49, seed=0)
    assert chance.overlap_p > 0.05
    assert abs(chance.correlation) < 0.2


def test_the_rows_come_from_shuffled(rows: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen = []
    shuffled = actdb.Selection.shuffled

    def watch(self: Any, size: int, **options: Any) -> Any:
        seen.append((size, options))
        return shuffled(self, size, **options)

    monkeypatch.setattr(actdb.Selection, "shuffled", watch)
    train_autoencoder(rows, n_latents=8, k=1, epochs=2, seed=5, batch_rows=1000)
    assert seen == [(1000, {"seed": 5, "epochs": 2})]


def test_a_gated_autoencoder_finds_planted_features_and_does_not_shrink_them(model: Sparse, rows: Any) -> None:
    trained = train_gated(rows, n_latents=64, sparsity=2.0, epochs=40, seed=0, batch_rows=256)
    assert explained_variance(trained.model, rows.numpy()) > 0.8
    columns = trained.model.decoder.detach()
    torch.testing.assert_close(columns.norm(dim=1), torch.ones(64))
    found = (model.directions @ columns.T).max(1).values
    assert (found > 0.9).float().mean() > 0.75
    given = torch.from_numpy(rows.numpy())
    with torch.inference_mode():
        latents, rebuilt = trained.model.encode(given), trained.model(given)
    assert (latents >= 0).all()
    assert 1 < (latents > 0).float().sum(1).mean() < 3 * N_ACTIVE
    # an L1 penalty on the latents themselves would leave reconstructions short: x̂ is the least-squares multiple of x
    centred, rebuilt = given - given.mean(0), rebuilt - given.mean(0)
    assert (centred * rebuilt).sum() / rebuilt.square().sum() == pytest.approx(1.0, abs=0.05)


def test_the_gated_objective_is_that_of_the_paper() -> None:
    model = GatedAutoencoder(5, 7, 0.3, seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in (model.encoder_bias, model.magnitude_scale, model.magnitude_bias, model.decoder_bias):
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    rows = torch.randn(9, 5, generator=generator)
    found = model.objective(rows, torch.zeros(7, dtype=torch.long), 1.0)
    centred = (rows - model.decoder_bias) @ model.encoder
    gate = centred + model.encoder_bias
    latents = torch.where(gate > 0, (centred * model.magnitude_scale.exp() + model.magnitude_bias).relu(), 0.0)
    rebuilt = latents @ model.decoder + model.decoder_bias
    by_gate = gate.relu() @ model.decoder + model.decoder_bias
    variance = (rows - rows.mean(0)).square().sum()
    error, auxiliary = (rows - rebuilt).square().sum(), (rows - by_gate).square().sum()
    expected = (error + 0.3 * gate.relu().sum() + auxiliary) / variance
    torch.testing.assert_close(found.total, expected)
    torch.testing.assert_close(found.loss, error / variance)
    assert torch.equal(found.fired, (latents > 0).any(0))
    torch.testing.assert_close(model.encode(rows), latents)
    half = model.objective(rows, torch.zeros(7, dtype=torch.long), 0.05)  # in the warm-up
    torch.testing.assert_close(found.total - half.total, 0.15 * gate.relu().sum() / variance)


def test_the_auxiliary_loss_reaches_the_gate_and_not_the_decoder() -> None:
    model = GatedAutoencoder(5, 7, 0.0, seed=1)
    with torch.no_grad():
        model.magnitude_bias.fill_(-100.0)  # nothing fires: what is left is the auxiliary loss
    model.objective(torch.randn(9, 5, generator=torch.Generator().manual_seed(0)), torch.zeros(7), 1.0).total.backward()
    assert model.encoder.grad is not None
    assert model.encoder.grad.abs().max() > 0
    assert model.encoder_bias.grad is not None
    assert model.encoder_bias.grad.abs().max() > 0
    assert model.decoder.grad is None or model.decoder.grad.abs().max() == 0
    with pytest.raises(actdb.SettingError, match="sparsity -1: choose 0 or more"):
        GatedAutoencoder(5, 7, -1, seed=0)
