"""Harvesting against the forward pass itself, and against what researchers do without a database.

GPT-2-small's shape with random weights, 16 × 128 tokens a batch, sites resid_post, z, pattern, mlp_post with head
statistics, float16, default codec. `run_with_cache + torch.save` keeps the same sites in one file a batch.
"""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch

import actdb
from actdb.harvesting.execution import run_harvest
from actdb.harvesting.harvest import plan_harvest
from actdb.harvesting.models import Model, load_model
from actdb.harvesting.settings import Settings
from actdb.harvesting.sites import LAYER_SITES, forward
from benchmarks.harness import Table, take_turns

BATCH, TOKENS = 16, 128
SITES = ("resid_post", "z", "pattern", "mlp_post")
SCALE = {"full": (4, 5), "quick": (2, 2), "tiny": (1, 1)}  # batches, rounds


def run(size: str, folder: Path) -> Table:
    """Return tokens a second of each way, as ratios to the bare forward pass with logits."""
    n_batches, rounds = SCALE[size]
    model = _model(size, folder)
    vocabulary = int(model.config["d_vocab"])
    ids = torch.from_numpy(np.random.default_rng(0).integers(0, vocabulary, (n_batches, BATCH, TOKENS)))
    prompts = [{"tokens": prompt.tolist()} for batch in ids for prompt in batch]
    plans = {
        "actdb, four sites and statistics": Settings(sites=SITES, run="full"),
        "actdb, statistics only": Settings(sites=(), run="stats"),
    }
    planned = {name: plan_harvest(model.module, prompts, settings) for name, settings in plans.items()}
    names = [f"blocks.{layer}.{LAYER_SITES[site]}" for layer in range(model.n_layers) for site in SITES]

    def harvest(name: str) -> None:
        for part in ("runs", "arrays.zarr"):  # the weights stay: a database keeps them once a model
            shutil.rmtree(folder / "x.actdb" / part, ignore_errors=True)
        run_harvest(planned[name], folder / "x.actdb")

    def bare(*, unembed: bool) -> None:
        for batch in ids:
            forward(model, batch, torch.ones_like(batch), unembed=unembed)

    def cache_and_save() -> None:
        for number, batch in enumerate(ids):
            torch.save(cached(model, batch, names), folder / f"{number}.pt")

    harvest("actdb, four sites and statistics")
    _assert_equal(actdb.open(folder / "x.actdb").run(), cached(model, ids[0], names), model.n_layers)
    medians = take_turns(
        {
            "bare forward pass with logits": lambda: bare(unembed=True),
            "bare forward pass without logits": lambda: bare(unembed=False),
            **{name: lambda name=name: harvest(name) for name in planned},
            "run_with_cache + torch.save": cache_and_save,
        },
        rounds=rounds,
    )
    n_tokens, reference = ids.numel(), medians["bare forward pass with logits"]
    best = medians["bare forward pass without logits"]
    rows = [(name, n_tokens / t, reference / t, best / t) for name, t in medians.items()]
    header = ("way", "tokens/s", "÷ forward with logits", "÷ forward without")
    return Table("Harvest", (__doc__ or "").strip().replace("\n", " "), header, rows)


def cached(model: Model, batch: torch.Tensor, names: list[str]) -> dict[str, torch.Tensor]:
    """Return the same sites by `run_with_cache`, in float16."""
    module: Any = model.module
    with torch.inference_mode():
        _, cache = module.run_with_cache(batch, names_filter=names)
    return {name: cache[name].half() for name in names}


def _assert_equal(run: actdb.Run, cache: dict[str, torch.Tensor], n_layers: int) -> None:
    for site in SITES:
        for layer in range(n_layers):
            value = cache[f"blocks.{layer}.{LAYER_SITES[site]}"][3].float().numpy()
            stored = run[site].sel(layer=layer, prompt=3).numpy().astype(np.float32)
            assert np.allclose(stored, value.transpose(1, 0, 2) if site == "z" else value, atol=2e-3), site


def _model(size: str, folder: Path) -> Model:
    if size != "tiny":
        return load_model("gpt2-small", random_init=0)
    from transformers import GPT2Config

    config = GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=50, n_positions=TOKENS)
    config.architectures = ["GPT2LMHeadModel"]
    config.save_pretrained(folder / "model")
    return load_model(folder / "model", random_init=0)
