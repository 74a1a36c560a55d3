"""Rotations, merging, buffers, and the training: its loss, its chain of phases, kills and resumes."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import actdb
from analyses.subspace_partition import training
from analyses.subspace_partition.buffer import Buffer, as_buffer, fill_buffer
from analyses.subspace_partition.merging import begin_anew, choose_pairs, merge_pairs
from analyses.subspace_partition.partition import (
    Partition,
    Rotation,
    span_overlap,
    store_partition,
    unit_sizes,
)
from analyses.subspace_partition.planted import draw_sample, measure_recovery, orthogonal_model, store_noise
from analyses.subspace_partition.training import END, MERGE, Recipe, Trained, partition_loss, train_partition

TINY = Recipe(
    unit=1,
    n_queries=32,
    n_key_blocks=3,
    learning_rate=0.02,
    first_merge=40,
    merge_every=20,
    n_steps=100,
    information_keys=600,
    information_queries=300,
    save_every=20,
)


def two_circles(n: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows on a circle in each of two orthogonal planes of four dimensions, independent; and the planes' basis."""
    generator = torch.Generator().manual_seed(seed)
    angles = 2 * torch.pi * torch.rand(n, 2, generator=generator)
    flat = torch.stack([angles.cos(), angles.sin()], 2).reshape(n, 4)  # cos a, sin a, cos b, sin b
    turn = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(77))).Q
    return flat @ turn.T, turn


def same(a: Trained, b: Trained) -> bool:
    return (
        np.array_equal(a.partition.rotation, b.partition.rotation)
        and np.array_equal(a.losses, b.losses)
        and a.partition.sizes == b.partition.sizes
        and [(e.step, e.kind, e.pairs) for e in a.events] == [(e.step, e.kind, e.pairs) for e in b.events]
    )


def test_rotation_begins_as_the_identity_and_stays_orthogonal() -> None:
    rotation = Rotation(6, (4, 2))
    assert torch.equal(rotation.basis, torch.eye(6))
    optimizer = torch.optim.Adam(rotation.parameters(), lr=0.1)
    rows = torch.randn(20, 6, generator=torch.Generator().manual_seed(0))
    for _ in range(50):
        optimizer.zero_grad()
        rotation(rows)[:, :2].abs().mean().backward()
        optimizer.step()
    found = rotation.frozen()
    assert not np.allclose(found.rotation, np.eye(6), atol=0.1)
    np.testing.assert_allclose(found.rotation.T @ found.rotation, np.eye(6), atol=1e-6)
    np.testing.assert_allclose(found.rotation, rotation.basis.detach().numpy(), atol=1e-5)
    again = Rotation(6, (3, 3), start=torch.from_numpy(found.rotation))
    np.testing.assert_allclose(again.basis.detach().numpy(), found.rotation, atol=1e-6)
    with pytest.raises(actdb.SettingError, match="do not add up to the width 6"):
        Rotation(6, (4, 4))
    with pytest.raises(actdb.SettingError, match="unit 4: it does not divide the width 6; choose one of 1, 2, 3, 6"):
        unit_sizes(6, 4)


def test_loss_is_the_mean_of_means_and_flows_through_both_sides() -> None:
    generator = torch.Generator().manual_seed(0)
    queries, keys = torch.randn(7, 5, generator=generator), torch.randn(40, 5, generator=generator)
    sizes = (3, 2)
    turn = torch.linalg.qr(torch.randn(5, 5, generator=generator)).Q.requires_grad_()
    loss = partition_loss(turn, sizes, queries, [keys[:15], keys[15:]])
    q, k = queries @ turn, keys @ turn
    per_subspace = [torch.cdist(q[:, c], k[:, c]).amin(1).mean() for c in (slice(0, 3), slice(3, 5))]
    truth = sum(per_subspace) / 2
    torch.testing.assert_close(loss, truth)
    torch.testing.assert_close(
        torch.autograd.grad(loss, turn)[0], torch.autograd.grad(truth, turn)[0], atol=1e-5, rtol=1e-4
    )


def test_loss_of_equal_rows_has_a_gradient() -> None:
    turn = torch.eye(4, requires_grad=True)
    loss = partition_loss(turn, (2, 2), torch.ones(3, 4), [torch.ones(40, 4)])
    loss.backward()
    assert loss.item() == 0
    assert turn.grad is not None
    assert turn.grad.isfinite().all()


def test_pairs_are_chosen_greedily_and_disjoint() -> None:
    information = np.array([[0, 0.9, 0.8, 0.1], [0.9, 0, 0.7, 0.2], [0.8, 0.7, 0, 0.3], [0.1, 0.2, 0.3, 0]], np.float64)
    np.fill_diagonal(information, np.nan)
    assert choose_pairs(information, threshold=0.04, n_most=9) == ((0, 1), (2, 3))
    assert choose_pairs(information, threshold=0.04, n_most=1) == ((0, 1),)
    assert choose_pairs(information, threshold=0.5, n_most=9) == ((0, 1),)
    assert choose_pairs(information, threshold=0.9, n_most=9) == ()


def test_merging_permutes_columns_and_sorts_sizes() -> None:
    basis = torch.eye(6)
    merged, sizes = merge_pairs(basis, (2, 1, 1, 2), ((1, 2),))
    assert sizes == (2, 2, 2)
    assert torch.equal(merged, basis[:, [0, 1, 2, 3, 4, 5]])
    merged, sizes = merge_pairs(basis, (2, 1, 1, 2), ((0, 2),))
    assert sizes == (3, 2, 1)
    assert torch.equal(merged, basis[:, [0, 1, 3, 4, 5, 2]])


def test_a_pair_begun_anew_keeps_its_span() -> None:
    basis = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(1))).Q
    turned = begin_anew(basis, (2, 2, 2), (0, 2), seed=3)
    assert torch.equal(turned[:, 2:4], basis[:, 2:4])
    places = [0, 1, 4, 5]
    assert span_overlap(turned[:, places].numpy(), basis[:, places].numpy()) == pytest.approx(1)
    assert span_overlap(turned[:, :2].numpy(), basis[:, :2].numpy()) < 0.95


def test_overlap_of_spans() -> None:
    axes = np.eye(4)
    assert span_overlap(axes[:, :2], axes[:, [1, 0]]) == 1
    assert span_overlap(axes[:, :2], axes[:, 2:]) == 0
    assert span_overlap(axes[:, :1], axes) == 1
    assert span_overlap(axes[:, :2], axes[:, 1:3]) == 0.5


@pytest.mark.parametrize("seed", [0, 1])
def test_training_finds_groups_and_merges_no_further(seed: int) -> None:
    model = orthogonal_model(seed=seed)
    rows = model.hidden(draw_sample(6000, np.random.default_rng(seed)).inputs())
    recipe = Recipe(
        unit=3,
        n_key_blocks=1,
        learning_rate=0.03,
        decays=True,
        first_merge=500,
        merge_every=60,
        n_steps=680,
        information_keys=2000,
        information_queries=500,
    )
    trained = train_partition(as_buffer(rows, seed=seed, block_rows=1000), recipe, seed=seed)
    assert trained.partition.sizes == (6, 6)
    assert measure_recovery(model, trained.partition).holds(0.99)
    assert [(event.step, event.kind) for event in trained.events] == [(500, MERGE), (560, MERGE), (620, END)]
    assert all(event.highest > 0.3 for event in trained.merges)
    assert trained.events[-1].highest < recipe.threshold  # the groups tell nothing of one another
    assert trained.losses[450:500].mean() < 0.8 * trained.losses[:5].mean()
    assert len(trained.losses) == 620


def test_merging_ends_at_a_number_of_subspaces() -> None:
    rows, _ = two_circles(2000, 0)
    recipe = replace(TINY, stop_at_n_subspaces=3, threshold=-10.0, first_merge=20, merge_every=10, n_steps=60)
    trained = train_partition(as_buffer(rows, seed=0, block_rows=500), recipe, seed=0)
    assert trained.partition.n_subspaces == 3
    assert len(trained.losses) == recipe.n_steps
    recipe = replace(recipe, stop_at_n_subspaces=None, first_merge=5, merge_every=5)
    trained = train_partition(as_buffer(rows, seed=0, block_rows=500), recipe, seed=0)
    assert trained.partition.sizes == (4,)


def test_a_pair_is_begun_anew_before_merging() -> None:
    rows, _ = two_circles(2000, 0)
    recipe = replace(TINY, n_anew=1, first_merge=20, merge_every=20, n_steps=60)
    trained = train_partition(as_buffer(rows, seed=0, block_rows=500), recipe, seed=0)
    assert trained.events[0].kind == training.BEGIN_ANEW
    assert all(event.kind != training.BEGIN_ANEW for event in trained.events[1:])


@pytest.mark.parametrize("n_steps_done", [25, 60, 79])
def test_a_killed_training_ends_with_the_same_partition(
    n_steps_done: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, _ = two_circles(2000, 0)
    buffer = as_buffer(rows, seed=0, block_rows=500)
    whole = train_partition(buffer, TINY, seed=0)
    real, calls = training.partition_loss, []

    def killed(*arguments: object) -> torch.Tensor:
        calls.append(1)
        if len(calls) > n_steps_done:
            raise KeyboardInterrupt
        return real(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(training, "partition_loss", killed)
    if n_steps_done < len(whole.losses):
        with pytest.raises(KeyboardInterrupt):
            train_partition(buffer, TINY, seed=0, state=tmp_path)
    monkeypatch.setattr(training, "partition_loss", real)
    assert same(train_partition(buffer, TINY, seed=0, state=tmp_path), whole)
    assert same(train_partition(buffer, TINY, seed=0, state=tmp_path), whole)  # done: nothing is trained
    assert [file.name for file in tmp_path.iterdir()] == ["chain.pt"]
    with pytest.raises(actdb.SettingError, match="another training: seed differ; remove"):
        train_partition(buffer, TINY, seed=1, state=tmp_path)
    with pytest.raises(actdb.SettingError, match="another training: rows_sum differ"):
        train_partition(as_buffer(rows + 1, seed=0, block_rows=500), TINY, seed=0, state=tmp_path)


def test_queries_are_never_among_their_keys() -> None:
    buffer = as_buffer(torch.arange(40.0)[:, None].expand(40, 2), seed=0, block_rows=10)
    for step in range(20):
        queries, keys = buffer.draw(5, 2, torch.Generator().manual_seed(step))
        assert len(keys) == 2
        assert not set(queries[:, 0].tolist()) & set(torch.cat(keys)[:, 0].tolist())
    queries, rest = buffer.sample(8, 27, seed=0)
    assert len(queries) == 8
    assert len(rest) == 27
    assert len(set(torch.cat([queries, rest])[:, 0].tolist())) == 35
    with pytest.raises(actdb.SettingError, match="needs two blocks of 10, 20 rows"):
        Buffer(torch.zeros(19, 2), 10)


def test_a_buffer_is_filled_from_the_database_and_a_partition_kept_there(tmp_path: Path) -> None:
    store_noise(tmp_path / "x.actdb", "noise", n_rows=640, seed=0, width=6)
    with actdb.open(tmp_path / "x.actdb", mode="a") as db:
        run = db.run("noise")
        stored = run["resid_post"].sel(layer=0)
        buffer = fill_buffer(stored, seed=3)
        assert buffer.block_rows == 320
        order = np.lexsort(buffer.rows.numpy().T)
        truth = stored.numpy()
        np.testing.assert_array_equal(buffer.rows.numpy()[order], truth[np.lexsort(truth.T)])
        assert not np.array_equal(buffer.rows.numpy(), truth)
        few = fill_buffer(stored, seed=3, n_rows=200, block_rows=50, dtype=torch.float16)
        assert few.rows.shape == (200, 6)
        assert few.rows.dtype == torch.float16
        rotation = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(4))).Q.numpy()
        partition = Partition(rotation, (4, 2))
        store_partition(db, run, "mine", partition, site="resid_post", layer=0, seed=3)
        store_partition(db, run, "mine", partition, site="resid_post", layer=0, seed=4)  # in place of the first
        kept = Partition.read(db, run, "mine")
        assert kept.sizes == (4, 2)
        np.testing.assert_array_equal(kept.rotation, rotation)
        sources = db.sql(
            "SELECT site, layer, seed, fold_ln, sizes FROM partition_sources WHERE partition = 'mine'"
        ).fetchall()
        assert sources == [("resid_post", 0, 4, None, [4, 2])]
        found = db.nearest("resid_post", layer=0, prompt=0, pos=0, k=3, metric="l2", partition="mine", subspace=1)
        apart = np.linalg.norm((truth - truth[0]) @ kept.basis(1), axis=1)
        distances = [row[found.columns.index("distance")] for row in found.fetchall()]
        np.testing.assert_allclose(distances, np.sort(apart)[1:4], rtol=1e-4)
        with pytest.raises(actdb.SettingError, match="has no partition 'other'"):
            Partition.read(db, run, "other")
    assert [part.shape for part in partition.project(truth[:5])] == [(5, 4), (5, 2)]
