"""Neuron and token statistics equal NumPy over what was stored, at any cut into batches and parts."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hooked import TinyModel, random_prompts
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from transformer_lens.config import TransformerBridgeConfig
from transformer_lens.model_bridge import TransformerBridge

import actdb
from actdb.harvesting.statistics.neurons import Highest, Moments
from actdb.schema import N_TOP

PROMPTS = random_prompts(30, d_vocab=16)


def harvest(out: Path, **options: Any) -> actdb.Run:
    return actdb.harvest(TinyModel(), PROMPTS, out, store="float32", **options)


def top_rows(values: np.ndarray, prompt: np.ndarray, pos: np.ndarray, k: int) -> list[tuple[float, int, int]]:
    order = np.lexsort((pos, prompt, -values))[:k]
    return [(float(values[i]), int(prompt[i]), int(pos[i])) for i in order]


@pytest.mark.parametrize("options", [{}, {"part_tokens": 40, "batch_tokens": 24}, {"positions": "last"}])
def test_neurons_equal_numpy(tmp_path: Path, options: dict[str, Any]) -> None:
    """Whatever the cut, and whatever positions are stored: statistics speak of all of them."""
    batches = {name: value for name, value in options.items() if name != "positions"}
    whole = harvest(tmp_path / "whole", sites=["mlp_post"], **batches)
    harvest(tmp_path / "x", stats=["neurons"], sites=["resid_post"], **options)
    site = whole["mlp_post"]
    with actdb.open(tmp_path / "x") as db:
        for layer in site.layers:
            selection = site.sel(layer=layer)
            values, prompt, pos = selection.numpy().astype(np.float64), selection.prompt, selection.pos
            found = db.sql("SELECT * FROM neuron_stats WHERE layer = ? ORDER BY neuron", [layer]).df()
            std = values.std(0)
            assert np.array_equal(found["n"], [len(values)] * values.shape[1])
            assert np.allclose(found["mean"], values.mean(0), atol=1e-6)
            assert np.allclose(found["std"], std, atol=1e-6)
            skew = ((values - values.mean(0)) ** 3).mean(0) / std**3
            assert np.allclose(found["skew"], skew, atol=1e-4)
            assert np.array_equal(found["max"], values.max(0).astype(np.float32))
            assert np.allclose(found["active_fraction"], (values > 0).mean(0))
            for neuron in range(0, values.shape[1], 5):
                query = "SELECT value, prompt_id, pos FROM neuron_top WHERE layer = ? AND neuron = ? ORDER BY rank"
                wanted = top_rows(selection.numpy()[:, neuron], prompt, pos, N_TOP)
                assert db.sql(query, [layer, neuron]).fetchall() == wanted


def bridge() -> TransformerBridge:
    cfg = TransformerBridgeConfig(
        n_layers=1, d_model=8, n_heads=2, d_head=4, d_vocab=16, n_ctx=32, attn_only=True, seed=0, act_fn="relu"
    )
    return TransformerBridge.boot_native(cfg)


def test_tokens_equal_the_logits(tmp_path: Path) -> None:
    options: dict[str, Any] = {"store": "float32", "part_tokens": 60, "batch_tokens": 30}
    run = actdb.harvest(bridge(), PROMPTS, tmp_path / "x", sites=["logits"], stats=["tokens"], **options)
    with actdb.open(tmp_path / "x") as db:
        for prompt in range(0, 30, 4):
            logits, tokens = run["logits"].sel(prompt=prompt).numpy().astype(np.float64), run.tokens(prompt)
            logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
            query = "SELECT loss, entropy, rank FROM token_stats WHERE prompt_id = ? ORDER BY pos"
            rows = db.sql(query, [prompt]).fetchall()
            assert len(rows) == len(tokens)
            assert rows[-1][0] is None
            assert rows[-1][2] is None
            entropy = -(np.exp(logp) * logp).sum(-1)
            assert np.allclose([row[1] for row in rows], entropy, atol=1e-5)
            for pos, (loss, _, rank) in enumerate(rows[:-1]):
                assert loss == pytest.approx(-logp[pos, tokens[pos + 1]], abs=1e-5)
                assert rank == int((logits[pos] > logits[pos, tokens[pos + 1]]).sum())


def test_the_unembedding_runs_only_for_tokens(tmp_path: Path) -> None:
    """Where no statistic needs logits, the forward pass ends before them."""
    model, n_batches = bridge(), 0

    def count(tensor: torch.Tensor, hook: Any) -> None:
        nonlocal n_batches
        n_batches += 1

    actdb.harvest(model, PROMPTS[:4], tmp_path / "x", run="heads", stats=["heads"], sites=["z"])
    model.hook_dict["unembed.hook_out"].add_hook(count)
    actdb.harvest(model, PROMPTS[:4], tmp_path / "x", run="again", stats=["heads"], sites=["z"])
    of_the_probe = n_batches
    actdb.harvest(model, PROMPTS[:4], tmp_path / "x", run="tokens", stats=["tokens"], sites=["z"])
    assert n_batches > 2 * of_the_probe


def test_defaults_and_what_is_lacking(tmp_path: Path) -> None:
    with actdb.open(harvest_path(tmp_path / "x")) as db:
        assert db.sql("SELECT count(*) FROM neuron_stats").fetchone()[0] > 0  # mlp_post is harvested by default
        assert db.sql("SELECT count(*) FROM token_stats").fetchone() == (0,)
    with pytest.raises(actdb.SettingError, match="--stats speed: choose one of heads, neurons, tokens"):
        harvest(tmp_path / "y", stats=["speed"])


def harvest_path(out: Path) -> Path:
    harvest(out)
    return out


@given(
    hnp.arrays(np.float32, hnp.array_shapes(min_dims=2, max_dims=2, max_side=40), elements=st.floats(-8, 8, width=16)),
    st.lists(st.integers(0, 40), max_size=3),
)
@settings(deadline=None)
def test_moments_merge_exactly(values: np.ndarray, cuts: list[int]) -> None:
    held = Moments(torch.from_numpy(values))
    for rows in np.split(values, sorted(cuts)):
        if len(rows):
            held.add(torch.from_numpy(rows))
    wide = values.astype(np.float64)
    from_mean = wide - wide.mean(0)
    assert held.count == len(values)
    assert np.allclose(held.mean, wide.mean(0), atol=1e-5)
    assert np.allclose(held.m2, (from_mean**2).sum(0), rtol=1e-4, atol=1e-3)
    assert np.allclose(held.m3, (from_mean**3).sum(0), rtol=1e-3, atol=1e-2)
    assert np.array_equal(held.max, wide.max(0))
    assert np.array_equal(held.active, (wide > 0).sum(0))


@given(
    seed=st.integers(0, 2**20),
    n_rows=st.sampled_from([1, 15, 16, 63, 64, 65, 400]),
    n_batches=st.integers(1, 4),
    levels=st.sampled_from([2, 5, 10_000]),
)
@settings(deadline=None, max_examples=40)
def test_the_highest_are_those_of_a_full_sort(seed: int, n_rows: int, n_batches: int, levels: int) -> None:
    """With many ties (few levels) and few, below and above a group a row, at once and over several batches."""
    generator = np.random.default_rng(seed)
    values = generator.integers(0, levels, (n_rows, 7)).astype(np.float32)
    keys = generator.permutation(n_rows * 3)[:n_rows]
    held = Highest()
    for rows in np.array_split(np.arange(n_rows), n_batches):
        if len(rows):
            held.add(torch.from_numpy(values[rows]), torch.from_numpy(keys[rows]))
    found, places = held.sorted()
    for neuron in range(7):
        order = np.lexsort((keys, -values[:, neuron]))[:N_TOP]
        assert np.array_equal(found[neuron], values[order, neuron])
        assert np.array_equal(places[neuron], keys[order])
