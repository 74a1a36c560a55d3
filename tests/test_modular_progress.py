"""Modular arithmetic: a model that grokked needs its few key frequencies; a memory and random weights have none."""

from pathlib import Path
from typing import Any

import pytest

import actdb
from analyses.modular_arithmetic.ablation import ablate_directions
from analyses.modular_arithmetic.core import Core
from analyses.modular_arithmetic.progress import LEARNT
from analyses.modular_arithmetic.training import Training, run_training

SIZES: dict[str, Any] = {"modulus": 29, "d_model": 48, "d_mlp": 128, "learning_rate": 3e-3}
GROKKING: dict[str, Any] = {"train_share": 0.7, "weight_decay": 1.5, "n_epochs": 800, "every": 100}
MEMORISING: dict[str, Any] = {"train_share": 0.3, "weight_decay": 0.0, "n_epochs": 300, "every": 150, "group": "memory"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("trained")


def trained(folder: Path, training: Training) -> Core:
    """Steps 1 to 3 of a training."""
    found = run_training(training, folder / "x.actdb")
    return Core(actdb.open(folder / "x.actdb"), training.name, found.runs, folder, seed=0, trained=found)


@pytest.fixture(scope="module")
def grokked(folder: Path) -> Core:
    return trained(folder, Training(**SIZES, **GROKKING))


@pytest.fixture(scope="module")
def memorising(folder: Path) -> Core:
    return trained(folder, Training(**SIZES, **MEMORISING))


def test_a_grokked_model_needs_its_few_frequencies(grokked: Core) -> None:
    last, spectrum = grokked.measures[-1], grokked.spectrum
    assert last.train_accuracy == 1.0
    assert last.test_accuracy > 0.9
    assert 2 <= len(spectrum.keys) <= 5
    assert spectrum.key_share >= 0.9
    assert spectrum.key_share > 2 * spectrum.null_share(len(spectrum.keys))
    assert last.restricted_loss < last.loss + 0.05
    assert last.excluded_loss > 2.0
    assert last.random_excluded < 0.1
    assert last.random_restricted > 2.0
    assert last.gini > grokked.measures[0].gini + 0.3


def test_the_embeddings_key_directions_are_what_it_computes_with(grokked: Core) -> None:
    found = ablate_directions(grokked.grid, grokked.spectrum.keys, seed=0)
    assert found.clean > 0.95
    assert found.key < 0.2
    assert found.only_key > 0.9
    assert found.random.value > found.key + 0.2
    assert found.only_random.value < found.only_key - 0.2


def test_a_memory_has_neither(memorising: Core) -> None:
    last = memorising.measures[-1]
    assert last.train_accuracy >= LEARNT
    assert last.test_accuracy < 0.3
    assert memorising.spectrum.key_share < 0.6
    assert last.restricted_loss > 1.0
    assert last.excluded_loss < 0.5
    assert memorising.phases.memorised is not None
    assert memorising.phases.grokked is None


def test_untrained_weights_have_neither(grokked: Core) -> None:
    core = Core(grokked.db, "untrained", grokked.runs[:1], grokked.folder, seed=0)
    assert core.spectrum.keys == ()
    last = core.measures[0]
    assert last.logit_share == 0.0
    assert last.restricted_loss == pytest.approx(last.chance_loss, abs=0.1)
    assert last.excluded_loss == pytest.approx(last.train_loss)


def test_generalisation_follows_memorisation_and_the_circuit_forms_before(grokked: Core) -> None:
    phases = grokked.phases
    assert phases.memorised is not None
    first = next(m for m in grokked.measures if m.step == phases.memorised)
    last = grokked.measures[-1]
    assert first.test_loss > last.test_loss
    assert first.restricted_loss > last.restricted_loss


def test_the_steps_write_their_figures(grokked: Core) -> None:
    names = []
    for found in (grokked.frequencies(), grokked.progress(), grokked.intervene()):
        assert found.claims
        names += list(found.figures)
    assert names == ["figures/circles.png", "figures/neurons.png", "figures/progress.png", "figures/ablation.png"]
    assert all((grokked.folder / name).stat().st_size > 5000 for name in names)
