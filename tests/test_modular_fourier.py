"""Modular arithmetic: planted frequencies are found and none else, and the progress measures tell waves from memory."""

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from analyses.modular_arithmetic import fourier
from analyses.modular_arithmetic.model import answers
from analyses.modular_arithmetic.progress import Predictions, phases

P = 31
Floats = npt.NDArray[np.float64]


def planted(frequencies: dict[int, float], *, d: int = 24, noise: float = 0.02, seed: int = 0) -> Floats:
    """An embedding [P, d] of circles of given amplitudes in random planes, and noise."""
    generator = np.random.default_rng(seed)
    axes = np.linalg.qr(generator.standard_normal((d, d)))[0]
    matrix = noise * generator.standard_normal((P, d)) + generator.standard_normal(d)  # the mean does not count
    for i, (k, amplitude) in enumerate(frequencies.items()):
        angle = 2 * np.pi * k * np.arange(P) / P
        matrix += amplitude * (np.outer(np.cos(angle), axes[2 * i]) + np.outer(np.sin(angle), axes[2 * i + 1]))
    return matrix


def wave_logits(frequencies: dict[int, float], *, p: int = P) -> Floats:
    """The logits of the Fourier algorithm: a sum of cos 2πk(a + b − c)/p."""
    a, b = np.divmod(np.arange(p * p), p)
    apart = (a + b)[:, None] - np.arange(p)
    return np.asarray(sum(size * np.cos(2 * np.pi * k * apart / p) for k, size in frequencies.items()))


@given(st.integers(3, 24))
def test_the_basis_is_complete_and_orthonormal(p: int) -> None:
    basis = fourier.basis(p)
    np.testing.assert_allclose(basis @ basis.T, np.eye(p), atol=1e-12)


@given(st.integers(3, 24), st.integers(1, 5), st.integers(0, 99))
def test_power_is_that_of_numpys_transform(p: int, d: int, seed: int) -> None:
    matrix = np.random.default_rng(seed).standard_normal((p, d))
    squares = (np.abs(np.fft.rfft(matrix, axis=0)) ** 2).sum(1)[1:]
    if p % 2 == 0:
        squares[-1] /= 2  # of p/2 there is one wave, of others two
    np.testing.assert_allclose(fourier.power(matrix), squares / squares.sum(), atol=1e-12)


@pytest.mark.parametrize("frequencies", [{5: 1.0}, {3: 1.0, 7: 0.8, 11: 0.6}, {2: 1.0, 14: 2.0, 9: 1.5, 4: 1.1}])
def test_planted_frequencies_are_found_and_none_else(frequencies: dict[int, float]) -> None:
    found = fourier.spectrum(planted(frequencies), seed=1)
    assert set(found.keys) == set(frequencies)
    strongest = max(frequencies, key=lambda k: frequencies[k])
    assert found.keys[0] == strongest
    assert found.key_share > 0.98
    assert found.gini > found.null_gini + 0.5
    expected = frequencies[strongest] ** 2 / sum(size**2 for size in frequencies.values())
    assert found.power[strongest - 1] == pytest.approx(expected, abs=0.02)


def test_a_random_matrix_has_no_key_frequencies() -> None:
    generator = np.random.default_rng(3)
    found = [fourier.spectrum(generator.standard_normal((P, 24)), seed=i) for i in range(30)]
    assert sum(bool(each.keys) for each in found) <= 2  # at a level of 0.01
    assert np.mean([each.top_share() / each.null_share() for each in found]) == pytest.approx(1, abs=0.03)


def test_all_frequencies_together_hold_everything_of_any_matrix() -> None:
    noise = np.random.default_rng(0).standard_normal((P, 24))
    for matrix in (noise, planted({3: 1.0})):
        found = fourier.spectrum(matrix, seed=0)
        assert found.top_share(len(found.power)) == pytest.approx(1)
        assert found.null_share(len(found.power)) == pytest.approx(1)


def test_a_matrix_without_variance_has_no_spectrum() -> None:
    assert np.isnan(fourier.power(np.ones((7, 3)))).all()
    assert fourier.spectrum(np.ones((7, 3)), seed=0).keys == ()


@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_a_noised_circle_is_one_in_the_order_of_its_frequency_alone(noise: float) -> None:
    matrix = planted({6: 1.0}, noise=noise)
    circles = {k: fourier.circularity(matrix, k, seed=None) for k in range(1, P // 2 + 1)}
    assert circles[6].pearson > 0.9
    assert circles[6].adjacency < 0.5
    assert all(abs(circle.pearson) < 0.35 for k, circle in circles.items() if k != 6)
    null = fourier.circularity(matrix, 6, seed=0)
    assert null.null_pearson < 0.3
    assert 0.85 < null.null_adjacency < 1.0


def test_the_plane_of_a_frequency_shows_the_circle() -> None:
    points = fourier.plane(planted({6: 1.5, 2: 1.0}, noise=0.0), 6)
    np.testing.assert_allclose(np.linalg.norm(points, axis=1), 1.5, rtol=1e-6)
    turned = np.angle(points @ [1, 1j])
    steps = np.diff(turned[np.argsort(6 * np.arange(P) % P)]) % (2 * np.pi)
    np.testing.assert_allclose(np.minimum(steps, 2 * np.pi - steps), 2 * np.pi / P, rtol=1e-6)


def test_neurons_are_given_their_frequency_and_its_share() -> None:
    a, b = np.divmod(np.arange(P * P), P)
    w = 2 * np.pi / P
    tuned = np.cos(4 * w * a) + np.cos(4 * w * b) + np.sin(4 * w * a) * np.cos(4 * w * b) + 3
    mixed = np.cos(4 * w * a) + np.cos(9 * w * b) * 0.5
    noise = np.random.default_rng(0).standard_normal(P * P)
    found = fourier.neuron_spectrum(np.stack([tuned, mixed, noise, np.full(P * P, 2.0)], 1), P)
    assert found.frequency.tolist()[:2] == [4, 4]
    np.testing.assert_allclose(found.explained[:2], [1.0, 1 / 1.25], rtol=1e-6)
    assert found.explained[2] == pytest.approx(found.null, abs=0.02)
    assert found.active.tolist() == [True, True, True, False]


def test_the_grid_transform_has_the_power_of_numpys() -> None:
    values = np.random.default_rng(1).standard_normal((49, 2))
    mine = (fourier.grid_transform(values, 7) ** 2).transpose(2, 0, 1)
    other = np.abs(np.fft.fft2(values.reshape(7, 7, 2), axes=(0, 1))).transpose(2, 0, 1) ** 2 / 49
    folded = np.zeros((2, 4, 4))
    for i in range(7):
        for j in range(7):
            folded[:, min(i, 7 - i), min(j, 7 - j)] += other[:, i, j]
    rows = [[0], [1, 2], [3, 4], [5, 6]]
    own = np.array([[mine[:, i][:, :, j].sum((1, 2)) for j in rows] for i in rows]).transpose(2, 0, 1)
    np.testing.assert_allclose(own, folded, rtol=1e-9)


def test_the_fourier_algorithm_is_all_in_its_waves() -> None:
    keys = {3: 6.0, 8: 5.0, 13: 4.0}
    grid = Predictions(wave_logits(keys), np.arange(P * P) % 3 == 0)
    assert grid.hits().all()
    own = grid.losses().mean()
    assert grid.losses(grid.restricted([*keys])).mean() == pytest.approx(own, rel=1e-9)
    assert grid.losses(grid.excluded([*keys])).mean() == pytest.approx(np.log(P))
    assert grid.losses(grid.excluded([3])).mean() > 10 * own
    assert grid.losses(grid.restricted([1, 2, 4])).mean() == pytest.approx(np.log(P))  # other frequencies hold nothing


def test_a_memory_is_not_in_waves_of_the_sum() -> None:
    generator = np.random.default_rng(0)
    trained = generator.random(P * P) < 0.3
    logits = generator.standard_normal((P * P, P))
    logits[np.flatnonzero(trained), answers(P)[trained]] += 12
    grid = Predictions(logits, trained)
    assert grid.hits()[trained].all()
    assert grid.hits()[grid.held_out].mean() < 0.15
    keys = [3, 8, 13]
    assert grid.losses(grid.restricted(keys)).mean() > 2.0
    assert grid.losses(grid.excluded(keys))[trained].mean() < 0.1


def test_phases_are_read_off_the_checkpoints() -> None:
    from types import SimpleNamespace

    def checkpoints(*rows: tuple[int, float, float, float]) -> list[SimpleNamespace]:
        names = ("step", "train_accuracy", "test_accuracy", "test_loss")
        return [SimpleNamespace(**dict(zip(names, row, strict=True))) for row in rows]

    grokked = phases(checkpoints((0, 0, 0, 3.0), (10, 1, 0, 9.0), (20, 1, 0.2, 12.0), (30, 1, 0.995, 0.1)))  # type: ignore[arg-type]
    assert (grokked.memorised, grokked.turning, grokked.grokked) == (10, 20, 30)
    assert grokked.are_distinct
    memory = phases(checkpoints((0, 0, 0, 3.0), (10, 1, 0, 9.0), (20, 1, 0.0, 12.0)))  # type: ignore[arg-type]
    assert (memory.memorised, memory.turning, memory.grokked) == (10, None, None)
    assert not memory.are_distinct


def test_gini_goes_from_alike_to_one_alone() -> None:
    assert fourier.gini([1, 1, 1, 1]) == pytest.approx(0)
    assert fourier.gini([0, 0, 0, 1]) == pytest.approx(0.75)
    values = np.random.default_rng(0).random(50)
    direct = np.abs(values[:, None] - values).mean() / (2 * values.mean())
    assert fourier.gini(values) == pytest.approx(direct)
    assert np.isnan(fourier.gini([0, 0]))
