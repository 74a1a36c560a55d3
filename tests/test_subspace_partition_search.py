"""The fused search against torch.cdist, and the information estimator against scipy and known distributions."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import cdist
from scipy.special import digamma

from analyses.subspace_partition import information, search
from analyses.subspace_partition.information import mutual_information, normalised
from analyses.subspace_partition.partition import column_ranges
from analyses.subspace_partition.search import find_nearest, take_rows


def random_basis(width: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(width, width, generator=generator)).Q


def plain(queries: torch.Tensor, keys: torch.Tensor, basis: torch.Tensor, sizes: tuple[int, ...]) -> torch.Tensor:
    """The distances [subspace, query, key] that torch.cdist has, in float64."""
    q, k = queries.double() @ basis.double(), keys.double() @ basis.double()
    return torch.stack([torch.cdist(q[:, c], k[:, c]) for c in column_ranges(sizes)])


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 9),
    st.lists(st.integers(1, 150), min_size=1, max_size=4),
    st.lists(st.integers(1, 5), min_size=1, max_size=5),
    st.sampled_from([torch.float16, torch.float32]),
    st.integers(0, 99),
)
def test_search_finds_what_cdist_finds(
    n_queries: int, blocks: list[int], sizes: list[int], dtype: torch.dtype, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    width = sum(sizes)
    keys = [(torch.randn(n, width, generator=generator) + 3).to(dtype) for n in blocks]
    queries, basis = torch.randn(n_queries, width, generator=generator) + 3, random_basis(width, seed)
    found = find_nearest(queries, keys, basis, sizes)
    distances = plain(queries, torch.cat(keys), basis, tuple(sizes))
    torch.testing.assert_close(found.distance.double(), distances.amin(-1), atol=1e-4, rtol=0)
    chosen = distances.gather(2, found.index[..., None])[..., 0]
    torch.testing.assert_close(chosen, distances.amin(-1), atol=1e-4, rtol=0)
    turned = find_nearest(queries @ basis, torch.cat(keys).float() @ basis, None, sizes)
    torch.testing.assert_close(turned.distance, found.distance, atol=1e-4, rtol=0)


def test_search_goes_through_many_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(search.TILE_BYTES, "cpu", 4 * 10 * 64)  # two groups a tile
    generator = torch.Generator().manual_seed(1)
    keys, queries = torch.randn(1003, 8, generator=generator), torch.randn(20, 8, generator=generator)
    basis, sizes = random_basis(8), (5, 3)
    found = find_nearest(queries, keys.split(251), basis, sizes)
    truth = plain(queries, keys, basis, sizes).min(-1)
    assert torch.equal(found.index, truth.indices)
    torch.testing.assert_close(found.distance.double(), truth.values, atol=1e-4, rtol=0)


def test_search_far_from_the_origin_and_among_equal_rows() -> None:
    generator = torch.Generator().manual_seed(2)
    keys = torch.randn(300, 6, generator=generator) + 1000
    found = find_nearest(keys[:5], torch.cat([keys, keys]), torch.eye(6), (2, 4))
    assert float(found.distance.max()) < 1e-3  # each query is among the keys
    away = find_nearest(keys[:5] + 1, keys, torch.eye(6), (2, 4))
    torch.testing.assert_close(
        away.distance.double(), plain(keys[:5] + 1, keys, torch.eye(6), (2, 4)).amin(-1), atol=1e-3, rtol=0
    )


def test_rows_are_taken_through_blocks() -> None:
    blocks = [torch.arange(6.0).reshape(3, 2), torch.arange(6.0, 14.0).reshape(4, 2)]
    rows = torch.tensor([6, 0, 3, 2, 0])
    assert torch.equal(take_rows(blocks, rows), torch.cat(blocks)[rows])


def brute_force(queries: np.ndarray, keys: np.ndarray, sizes: tuple[int, int]) -> float:
    """The first KSG estimator with k = 1, as its formula reads."""
    x, y = slice(0, sizes[0]), slice(sizes[0], sum(sizes))
    parts = []
    for columns in (x, y):
        spread = np.sqrt(keys[:, columns].var(0).sum())
        parts.append(cdist(queries[:, columns] / spread, keys[:, columns] / spread))
    reach = np.maximum(*parts).min(1)
    counts = [(distances < reach[:, None]).sum(1) for distances in parts]
    terms = digamma(counts[0] + 1) + digamma(counts[1] + 1)
    return float(digamma(1) + digamma(len(keys) + 1) - terms.mean())


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 4), st.integers(1, 4), st.integers(2, 60), st.integers(2, 400), st.integers(0, 99))
def test_information_is_the_formula(a: int, b: int, n_queries: int, n_keys: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    mixing = generator.standard_normal((a + b, a + b))
    rows = generator.standard_normal((n_queries + n_keys, a + b)) @ mixing + 5
    queries, keys = rows[:n_queries], rows[n_queries:]
    found = mutual_information(torch.from_numpy(queries), torch.from_numpy(keys), torch.eye(a + b), (a, b), jitter=0.0)
    assert found[0, 1] == pytest.approx(brute_force(queries, keys, (a, b)), abs=2e-2 if n_keys > 50 else 0.3)
    assert found[0, 1] == found[1, 0]
    assert np.isnan(np.diag(found)).all()


def test_information_is_that_of_every_pair_in_any_tiling(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(3)
    rows = torch.randn(500, 9, generator=generator) @ torch.randn(9, 9, generator=generator)
    sizes, basis = (4, 3, 2), random_basis(9)
    whole = mutual_information(rows[:100], rows[100:], basis, sizes, seed=1)
    monkeypatch.setitem(information.TILE_ELEMENTS, "cpu", 3 * 32 * 7)  # seven keys a tile
    np.testing.assert_allclose(mutual_information(rows[:100], rows[100:], basis, sizes, seed=1), whole)
    turned = rows.double() @ basis.double()
    columns = list(column_ranges(sizes))
    for i, j in ((0, 1), (0, 2), (1, 2)):
        pair = torch.cat([turned[:, columns[i]], turned[:, columns[j]]], 1)
        n = (sizes[i], sizes[j])
        alone = mutual_information(pair[:100], pair[100:], torch.eye(sum(n)), n, jitter=0.0)[0, 1]
        assert whole[i, j] == pytest.approx(alone, abs=0.02)


@pytest.mark.parametrize("correlation", [0.0, 0.6, 0.9])
def test_information_of_correlated_gaussians_is_known(correlation: float) -> None:
    generator = np.random.default_rng(5)
    n, n_queries = 6000, 3000
    x = generator.standard_normal((n, 2))
    y = correlation * x + np.sqrt(1 - correlation**2) * generator.standard_normal((n, 2))
    rows = torch.from_numpy(np.concatenate([x * 7, y / 3], 1))
    found = mutual_information(rows[:n_queries], rows[n_queries:], torch.eye(4), (2, 2))
    known = -np.log(1 - correlation**2)  # twice −½ ln(1 − ρ²)
    assert found[0, 1] == pytest.approx(known, abs=0.08)


def test_information_of_equal_rows_is_not_that_of_ties() -> None:
    """Two independent coins: ties without noise would give ψ(N); and a coin beside itself has its entropy, ln 2."""
    generator = np.random.default_rng(6)
    coins = generator.integers(0, 2, (4000, 2)).astype(np.float64)
    rows = torch.from_numpy(np.concatenate([coins, coins[:, :1]], 1))
    found = mutual_information(rows[:1000], rows[1000:], torch.eye(3), (1, 1, 1))
    assert found[0, 1] == pytest.approx(0, abs=0.15)
    assert found[0, 2] == pytest.approx(np.log(2), abs=0.1)
    tied = mutual_information(rows[:1000], rows[1000:], torch.eye(3), (1, 1, 1), jitter=0.0)
    assert tied[0, 1] > 5


def test_information_is_divided_by_the_dimensions() -> None:
    np.testing.assert_allclose(normalised(np.full((2, 2), 6.0), (1, 3)), [[3.0, 1.5], [1.5, 1.0]])
