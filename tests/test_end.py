"""A harvest of the first layers runs no further than these, and stores the same bytes as one that does."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import actdb

PROMPTS = [{"tokens": [1, 5, 9, 7, 3]}, {"tokens": [2, 8, 4]}]


def count_calls(model: Any, layer: int) -> list[int]:
    """Return a list that grows whenever the MLP of a layer of a GPT-2 is run."""
    calls: list[int] = []
    inner = model.original_model.transformer.h[layer].mlp
    inner.register_forward_hook(lambda *given: calls.append(1))
    return calls


@pytest.fixture
def model(build: Callable[..., Any]) -> Any:
    from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module

    made = build("gpt2", n_layer=3)
    return build_bridge_from_module(made, "GPT2LMHeadModel", hf_config=made.config, model_name="gpt2-tiny")


def harvest(model: Any, out: Path, run: str, **options: Any) -> actdb.Run:
    return actdb.harvest(model, PROMPTS, out=out, run=run, store="float32", **options)


def test_layers_beyond_the_last_one_harvested_are_not_run(model: Any, tmp_path: Path) -> None:
    first, last = count_calls(model, 0), count_calls(model, 2)
    every = harvest(model, tmp_path / "x.actdb", "every", sites=("resid_post", "embed", "pattern"))
    n_first, n_last = len(first), len(last)
    assert n_last == n_first
    few = harvest(model, tmp_path / "x.actdb", "few", sites=("resid_post", "embed", "pattern"), layers=[0, 1])
    assert len(first) - n_first > len(last) - n_last == 2  # the probe alone looks at the whole model
    for site in ("resid_post", "pattern"):
        for prompt in range(2):
            expected = every[site].sel(layer=[0, 1], prompt=prompt).numpy()
            assert np.array_equal(few[site].sel(prompt=prompt).numpy(), expected)
    assert np.array_equal(few["embed"].numpy(), every["embed"].numpy())
    with actdb.open(tmp_path / "x.actdb") as db:
        query = "SELECT * EXCLUDE (run) FROM head_stats WHERE run = $1 AND layer < 2 ORDER BY prompt_id, layer, head"
        assert db.sql(query, ["few"]).fetchall() == db.sql(query, ["every"]).fetchall()


@pytest.mark.parametrize(
    "options",
    [
        {"sites": ("resid_post", "ln_final")},
        {"sites": ("resid_post",), "stats": ("tokens",)},
        {"sites": ("resid_post",), "hooks": [("blocks.2.hook_resid_post", lambda a, hook: None)], "hooks_id": "look"},
    ],
)
def test_they_are_run_where_something_is_taken_from_them(model: Any, tmp_path: Path, options: dict[str, Any]) -> None:
    first, last = count_calls(model, 0), count_calls(model, 2)
    harvest(model, tmp_path / "x.actdb", "x", layers=[0], **options)
    assert len(last) == len(first)


def test_an_intervention_before_the_end_acts(model: Any, tmp_path: Path) -> None:
    plain = harvest(model, tmp_path / "x.actdb", "plain", sites=("resid_post",), layers=[0])
    zero = [("hook_embed", lambda a, hook: torch.zeros_like(a))]
    changed = harvest(
        model, tmp_path / "x.actdb", "zero", sites=("resid_post",), layers=[0], hooks=zero, hooks_id="zero"
    )
    assert not np.allclose(plain["resid_post"].numpy(), changed["resid_post"].numpy())
