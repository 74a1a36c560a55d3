"""Measures of a partition: Gini, geometry, patching; baselines, pairs of prompts, and the toy's recovery."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import actdb
from analyses.subspace_partition.baseline import IDENTITY, PCA, PCA_BLOCKS, RANDOM, baselines
from analyses.subspace_partition.buffer import as_buffer
from analyses.subspace_partition.corpus import TEMPLATES, indirect_object_prompts, pack_documents
from analyses.subspace_partition.evaluation import (
    Pair,
    find_pairs,
    gini,
    gini_measures,
    measure_geometry,
    patch_subspaces,
)
from analyses.subspace_partition.partition import Partition
from analyses.subspace_partition.planted import (
    GROUP_SIZE,
    SuperpositionModel,
    draw_sample,
    measure_recovery,
    patch_effects,
)
from tests.hooked import TinyModel


def turn(width: int, seed: int = 0) -> np.ndarray:
    return np.linalg.qr(np.random.default_rng(seed).standard_normal((width, width)))[0].astype(np.float32)


def test_gini_is_half_the_relative_mean_difference() -> None:
    values = np.random.default_rng(0).random((5, 7))
    differences = np.abs(values[:, :, None] - values[:, None]).mean((1, 2))
    np.testing.assert_allclose(gini(values), differences / (2 * values.mean(1)))
    assert gini([1, 1, 1]) == 0
    assert gini([0, 0, 0, 5]) == 0.75
    assert gini([0, 0]) == 0
    effects = np.array([[3.0, -1.0]])
    found = gini_measures(effects, (3, 1), np.array([3.0, 1.0]))
    assert found["effect"] == 0.25
    assert found["effect_by_dim"] == 0
    assert found["effect_by_variance"] == 0


def test_geometry_is_that_of_the_rows() -> None:
    rows = np.random.default_rng(1).standard_normal((400, 6)).astype(np.float32) * [4, 3, 2, 1, 1, 1]
    buffer, partition = as_buffer(rows.astype(np.float32), seed=0), Partition(turn(6), (3, 2, 1))
    found = measure_geometry(buffer, partition, n_queries=50, n_keys=300, seed=2)
    queries, keys = buffer.sample(50, 300, seed=2)
    for i, (q, k) in enumerate(zip(partition.project(queries.numpy()), partition.project(keys.numpy()), strict=True)):
        apart = np.linalg.norm(q[:, None] - k, axis=2).min(1).mean()
        assert found.distance[i] == pytest.approx(apart, rel=1e-4)
        assert found.variance[i] == pytest.approx(k.var(0).sum(), rel=1e-4)
    assert found.unweighted == pytest.approx(found.distance.mean())
    assert found.weighted == pytest.approx((3 * found.distance[0] + 2 * found.distance[1] + found.distance[2]) / 6)
    assert found.relative == pytest.approx((found.distance / np.sqrt(found.variance)).mean())
    assert found.highest_normalised == pytest.approx(
        max(found.information[i, j] / (partition.sizes[i] + partition.sizes[j]) for i, j in ((0, 1), (0, 2), (1, 2)))
    )


def test_baselines_have_the_sizes_and_are_orthogonal() -> None:
    rows = np.random.default_rng(1).standard_normal((500, 6)) * [1, 2, 9, 3, 1, 1] + 50
    found = baselines(rows, (4, 2), unit=2, seed=0)
    assert found[PCA].sizes == (2, 2, 2)
    assert {found[name].sizes for name in (PCA_BLOCKS, IDENTITY, RANDOM)} == {(4, 2)}
    for partition in found.values():
        np.testing.assert_allclose(partition.rotation.T @ partition.rotation, np.eye(6), atol=1e-5)
    variance = (rows @ found[PCA].rotation).var(0)
    assert (np.diff(variance) < 0).all()
    assert abs(found[PCA].rotation[2, 0]) > 0.99


def paired_prompts() -> list[dict[str, Any]]:
    generator = np.random.default_rng(3)
    found = []
    for pair in range(6):
        length = 5 + pair % 2
        for role in ("clean", "corrupted"):
            labels = {"patch_pos": "2 4", "answer": 3, "wrong": 5} if role == "clean" else {}
            tokens = generator.integers(0, 16, length).tolist()
            found.append({"tokens": tokens, "pair": pair, "role": role, **labels})
    return found


def test_subspaces_are_patched_as_by_hand(tmp_path: Path) -> None:
    model = TinyModel().eval()
    path = tmp_path / "x.actdb"
    run = actdb.harvest(model, paired_prompts(), out=path, sites=("resid_post",), store="float32")
    partition = Partition(turn(8), (5, 2, 1))
    with actdb.open(path) as db:
        pairs = find_pairs(db, run)
        assert [(pair.clean, pair.corrupted, pair.pos) for pair in pairs] == [
            (2 * i, 2 * i + 1, (2, 4)) for i in range(6)
        ]
        found = patch_subspaces(model, run, partition, pairs, site="resid_post", layer=0)
        columns = partition.columns()
        for i, pair in enumerate(pairs):
            clean, other = (run["resid_post"].sel(layer=0, prompt=p).numpy() for p in (pair.clean, pair.corrupted))
            before = _logit_difference(model, clean, pair)
            assert found.clean[i] == pytest.approx(before, abs=1e-4)
            for j, own in enumerate([*columns, slice(None)]):
                rotated, given = clean @ partition.rotation, other @ partition.rotation
                rotated[np.ix_(pair.pos, range(8)[own])] = given[np.ix_(pair.pos, range(8)[own])]
                after = _logit_difference(model, rotated @ partition.rotation.T, pair)
                effect = found.whole[i] if own == slice(None) else found.effect[i, j]
                assert effect == pytest.approx(before - after, abs=1e-4)


def _logit_difference(model: TinyModel, after_block_0: np.ndarray, pair: Pair) -> float:
    """The rest of the model by hand, from the residual stream after block 0."""
    with torch.no_grad():
        x = model.blocks[1](torch.from_numpy(after_block_0)[None].float(), None)
        logits = (x @ model.W_E.T)[0, pair.query]
    return float(logits[pair.answer] - logits[pair.wrong])


def test_pairs_need_labels_and_one_length(tmp_path: Path) -> None:
    model, path = TinyModel(), tmp_path / "x.actdb"
    plain = actdb.harvest(model, [{"tokens": [1, 2]}], out=path, sites=("resid_post",), run="plain")
    with (
        actdb.open(path) as db,
        pytest.raises(actdb.SettingError, match="no labels answer, pair, patch_pos, role, wrong"),
    ):
        find_pairs(db, plain)
    prompts = paired_prompts()
    prompts[1]["tokens"] = [1]
    uneven = actdb.harvest(model, prompts, out=path, sites=("resid_post",), run="uneven")
    with actdb.open(path) as db, pytest.raises(actdb.SettingError, match="prompts 0 and 1, a pair, are of different"):
        find_pairs(db, uneven)


def test_documents_are_packed_without_a_gap() -> None:
    documents = [[1, 2, 3], [4], [5, 6, 7, 8, 9]]
    found = list(pack_documents(documents, end=0, context=4))
    assert [prompt["tokens"] for prompt in found] == [[1, 2, 3, 0], [4, 0, 5, 6], [7, 8, 9, 0]]
    assert list(pack_documents([[1]], end=0, context=4)) == []


def test_indirect_object_prompts_differ_in_what_comes_before() -> None:
    words: dict[str, int] = {}

    def encode(text: str) -> list[int]:
        return [words.setdefault(word, len(words) + 10) for word in text.replace(",", " ,").split()]

    prompts = indirect_object_prompts(encode, 30, start=[9], seed=0)
    assert len(prompts) == 60
    names = {word: number for number, word in words.items()}
    for clean, corrupted in zip(prompts[::2], prompts[1::2], strict=True):
        assert clean["tokens"][0] == 9
        assert (clean["pair"], clean["role"], corrupted["role"]) == (corrupted["pair"], "clean", "corrupted")
        places = [int(place) for place in clean["patch_pos"].split()]
        differ = [i for i, (a, b) in enumerate(zip(clean["tokens"], corrupted["tokens"], strict=True)) if a != b]
        assert sorted(place - 1 for place in places) == differ
        assert clean["tokens"].count(clean["answer"]) == 1  # the indirect object is named once, the subject twice
        assert clean["tokens"].count(clean["wrong"]) == 2
        assert names[clean["answer"]] != names[clean["wrong"]]
    assert len({names[p["tokens"][1]] for p in prompts}) == len(TEMPLATES)
    with pytest.raises(actdb.SettingError, match="has 0 of the names as one token; 4 are needed"):
        indirect_object_prompts(lambda text: [1] * len(text), 1, seed=0)


def test_a_sample_is_as_drawn() -> None:
    sample = draw_sample(5000, np.random.default_rng(0))
    x = sample.inputs().numpy().reshape(-1, 2, GROUP_SIZE)
    assert ((x > 0).sum(2) <= 1).all()
    assert (x.max(2) == sample.value).all()
    assert (sample.feature == GROUP_SIZE).mean() == pytest.approx(0.25, abs=0.02)
    rows, groups = np.nonzero(sample.feature < GROUP_SIZE)
    assert (x[rows, groups, sample.feature[rows, groups]] == sample.value[rows, groups]).all()
    pairs = {(int(t) // 21, int(t) % 21) for t in sample.tokens()}
    assert pairs == {tuple(row) for row in sample.feature.tolist()}


def planted_model(seed: int = 0) -> tuple[SuperpositionModel, np.ndarray]:
    """A model whose groups lie in orthogonal spans of 7 and 5 dimensions, by hand; and those spans."""
    model, basis = SuperpositionModel(seed=seed), turn(12, seed)
    generator = np.random.default_rng(seed)
    with torch.no_grad():
        for group, own in enumerate((slice(0, 7), slice(7, 12))):
            part = generator.standard_normal((GROUP_SIZE, own.stop - own.start)) @ basis[:, own].T
            rows = torch.from_numpy(part / np.linalg.norm(part, axis=1, keepdims=True)).float()
            model.W[group * GROUP_SIZE : (group + 1) * GROUP_SIZE] = rows
    return model.requires_grad_(False), basis


def test_recovery_is_that_of_spans() -> None:
    model, basis = planted_model()
    found = measure_recovery(model, Partition(basis[:, [*range(7, 12), *range(7)]], (5, 7)))
    assert found.holds(0.999)
    assert found.match == (1, 0)
    assert found.variance == pytest.approx((1, 1), abs=1e-5)
    assert not measure_recovery(model, Partition(turn(12, 5), (7, 5))).holds()
    assert not measure_recovery(model, Partition(basis, (7, 3, 2))).holds()
    assert not measure_recovery(model, Partition(basis, (12,))).holds()


def test_patching_a_group_changes_its_features_alone() -> None:
    model, basis = planted_model()
    effects = patch_effects(model, Partition(basis, (7, 5)), n_pairs=60, seed=0)
    group = np.arange(60) % 2
    own, other = effects[np.arange(60), group], effects[np.arange(60), 1 - group]
    np.testing.assert_allclose(other, 0, atol=1e-5)
    assert own.mean() > 0.5
