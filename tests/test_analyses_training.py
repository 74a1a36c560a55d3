"""The toy trainer: resumed trainings end with the same weights, checkpoints are harvested, states are told apart."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hooked import TinyModel
from torch.nn import functional

import actdb
from analyses.common.training import harvest_steps, train

IDS = torch.randint(0, 16, (64, 6), generator=torch.Generator().manual_seed(0))


class Killed(Exception):
    pass


def loss_of(model: Any, step: int) -> torch.Tensor:
    batch = IDS[step % 4 * 16 :][:16]
    return functional.cross_entropy(model(batch)[:, :-1].transpose(1, 2), batch[:, 1:])


def start(model: TinyModel, **options: Any) -> np.ndarray:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    return train(model, loss_of, optimizer=optimizer, schedule=schedule, n_steps=20, **options)


def weights_of(model: TinyModel) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


def test_training_lowers_the_loss_and_visits_checkpoints() -> None:
    seen: list[tuple[int, bool]] = []
    model = TinyModel()
    losses = start(model, checkpoints=(0, 7, 20), visit=lambda step: seen.append((step, model.training)))
    assert seen == [(0, False), (7, False), (20, False)]
    assert model.training
    assert losses.shape == (20,)
    assert losses[-4:].mean() < losses[:4].mean()
    assert losses[0] == pytest.approx(float(loss_of(TinyModel(), 0).detach()))


@pytest.mark.parametrize("killed_at", [1, 6, 11, 20])
def test_a_killed_training_goes_on_to_the_same_weights(tmp_path: Path, killed_at: int) -> None:
    whole = TinyModel()
    losses = start(whole)

    steps_run: list[int] = []

    def killing(model: Any, step: int) -> torch.Tensor:
        if step == killed_at - 1 and not steps_run.count(step):
            steps_run.append(step)
            raise Killed
        return loss_of(model, step)

    def attempt(model: TinyModel, loss: Any, visited: list[int]) -> np.ndarray:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        return train(
            model,
            loss,
            optimizer=optimizer,
            schedule=schedule,
            n_steps=20,
            checkpoints=(0, 5, 20),
            visit=visited.append,
            state=tmp_path / "state.pt",
            save_every=4,
        )

    first, second = [], []
    with pytest.raises(Killed):
        attempt(TinyModel(), killing, first)
    resumed = TinyModel(seed=9)  # its own weights do not matter: the state's are loaded
    found = attempt(resumed, loss_of, second)
    np.testing.assert_array_equal(found, losses)
    for a, b in zip(weights_of(whole), weights_of(resumed), strict=True):
        assert torch.equal(a, b)
    assert set(first) | set(second) == {0, 5, 20}
    assert [path.name for path in tmp_path.iterdir()] == ["state.pt"]


def test_a_finished_training_is_not_repeated(tmp_path: Path) -> None:
    model = TinyModel()
    losses = start(model, state=tmp_path / "state.pt")
    again = TinyModel(seed=4)

    def never(module: Any, step: int) -> torch.Tensor:
        raise AssertionError

    optimizer = torch.optim.AdamW(again.parameters(), lr=1e-3)
    found = train(again, never, optimizer=optimizer, n_steps=20, state=tmp_path / "state.pt")
    np.testing.assert_array_equal(found, losses)
    assert all(torch.equal(a, b) for a, b in zip(weights_of(model), weights_of(again), strict=True))


def test_a_state_of_another_training_is_refused(tmp_path: Path) -> None:
    start(TinyModel(), state=tmp_path / "state.pt", identity={"seed": 1, "rate": 0.1})
    with pytest.raises(actdb.SettingError, match="another training: rate differ"):
        start(TinyModel(), state=tmp_path / "state.pt", identity={"seed": 1, "rate": 0.2})


def test_a_state_beyond_what_is_asked_for_is_refused(tmp_path: Path) -> None:
    start(TinyModel(), state=tmp_path / "state.pt")
    optimizer = torch.optim.AdamW(TinyModel().parameters())
    with pytest.raises(actdb.SettingError, match="at step 20, beyond the 10"):
        train(TinyModel(), loss_of, optimizer=optimizer, n_steps=10, state=tmp_path / "state.pt")


def test_a_visit_that_returns_true_ends_the_training(tmp_path: Path) -> None:
    for _ in range(2):  # the second call finds the state, visits once more and ends again
        model = TinyModel()
        losses = start(
            model, checkpoints=(5, 10), visit=lambda step: step >= 10, state=tmp_path / "state.pt", save_every=3
        )
        assert losses.shape == (10,)
        assert (losses > 0).all()


def test_a_gradient_is_clipped() -> None:
    model = TinyModel()
    before = weights_of(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    train(model, loss_of, optimizer=optimizer, n_steps=1, clip=1e-3)
    moved = torch.cat([(a - b).flatten() for a, b in zip(weights_of(model), before, strict=True)])
    assert float(moved.norm()) == pytest.approx(1e-3, rel=1e-2)


def test_checkpoints_become_the_steps_of_a_model(tmp_path: Path) -> None:
    model, prompts = TinyModel(), [{"tokens": [1, 2, 3]}, {"tokens": [4, 5]}]
    db = tmp_path / "x.actdb"
    expected: dict[int, torch.Tensor] = {}
    harvest = harvest_steps(model, iter(prompts), db, run="toy", sites=["resid_post"], store="float32")

    def visit(step: int) -> None:
        harvest(step)
        expected[step] = model.W_E.detach().clone()

    start(model, checkpoints=(0, 10, 20), visit=visit)
    with actdb.open(db) as found:
        assert [(run.name, run.step) for run in found.runs()] == [(f"toy-step{n}", n) for n in (0, 10, 20)]
        for step, weight in expected.items():
            assert torch.equal(found.run(f"toy-step{step}").torch_weight("W_E"), weight)
        steps = found.sql("SELECT step FROM runs ORDER BY step").fetchall()
    assert steps == [(0,), (10,), (20,)]
