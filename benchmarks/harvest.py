"""Harvesting against the forward pass itself, and against what researchers do without a database.

GPT-2-small's shape with random weights, 16 × 128 tokens a batch, sites resid_post, z, pattern, mlp_post with head
statistics, float16, default codec. The weights lie in the database already: they are written once a model. The forward
passes, actdb and `run_with_cache` go through the TransformerLens bridge; the peers below them through the Hugging Face
model inside it. `run_with_cache` keeps all four sites. nnsight keeps block, MLP activation and attention outputs,
`output_hidden_states` keeps residuals and patterns: fewer sites, for that is what their users get; torchlens logs every
operation, of which four a layer are kept. Peers store float16. These three take turns of their own, against the forward
pass with logits, and are put on the same scale: they leave gigabytes behind that slow what comes next.
"""

import shutil
from collections.abc import Callable
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
from benchmarks.harness import Goal, Table, missing, note, peers, take_turns

BATCH, TOKENS = 16, 128
SITES = ("resid_post", "z", "pattern", "mlp_post")
SCALE = {"full": (4, 3), "quick": (2, 2), "tiny": (1, 1)}  # batches of actdb and the forward pass, rounds
SAELENS = (
    " SAELens 6.51 cannot take part: it imports transformer_lens.HookedTransformer, which transformer-lens 4 removed."
)
SHARED = "casting, packing and encoding run on the cores that the model uses: see the profile"
Cache = dict[str, torch.Tensor]


def run(size: str, folder: Path) -> Table:
    """Return tokens a second of each way, as ratios to the bare forward pass with and without logits."""
    n_batches, rounds = SCALE[size]
    model = make_model(size, folder)
    ids, prompts = make_inputs(model, n_batches)
    planned = {
        name: plan_harvest(model.module, prompts, settings)
        for name, settings in {
            "actdb, four sites and statistics": Settings(sites=SITES, stats=("heads",), run="full"),
            "actdb, statistics only": Settings(sites=(), stats=("heads",), run="statistics"),
        }.items()
    }
    out = folder / "x.actdb"

    def bare(*, unembed: bool) -> None:
        for batch in ids:
            forward(model, batch, torch.ones_like(batch), unembed=unembed)

    def clear() -> None:
        for path in (out / "runs", out / "arrays.zarr", folder / "peer"):
            shutil.rmtree(path, ignore_errors=True)
        (folder / "peer").mkdir()

    ways: dict[str, Callable[[], Any]] = {
        "bare forward pass with logits": lambda: bare(unembed=True),
        "bare forward pass without logits": lambda: bare(unembed=False),
        **{name: lambda name=name: run_harvest(planned[name], out) for name in planned},
    }
    run_harvest(planned["actdb, four sites and statistics"], out)
    _assert_equal(actdb.open(out).run(), cached(model, ids[0]), model.n_layers)
    ways |= bridge_ways(model, ids[0], folder / "peer")
    medians = take_turns(ways, rounds=rounds, before=clear)
    n_tokens = {name: ids[0].numel() if name.startswith("run_with_cache") else ids.numel() for name in ways}
    speed = {name: n_tokens[name] / t for name, t in medians.items()}
    with_logits, without = speed["bare forward pass with logits"], speed["bare forward pass without logits"]
    others = plain_ways(model, ids[0], folder / "peer")
    again = "bare forward pass with logits"  # of the second round of turns, since others leave gigabytes behind
    medians = take_turns(
        {again: lambda: forward(model, ids[0], None, unembed=True), **others}, rounds=min(rounds, 2), before=clear
    )
    speed |= {name: with_logits * medians[again] / t for name, t in medians.items() if name != again}
    rows = [(name, v, v / with_logits, v / without) for name, v in speed.items()]
    full, statistics = speed["actdb, four sites and statistics"], speed["actdb, statistics only"]
    best = max(value for name, value in speed.items() if name.startswith("run_with_cache"))
    goals = (
        Goal("harvest ÷ forward pass with logits", full / with_logits, 1.1),
        Goal("harvest ÷ forward pass without unembedding", full / without, 0.9, why=SHARED),
        Goal("statistics only ÷ forward pass without unembedding", statistics / without, 0.95),
        Goal("harvest ÷ best peer that stores the same sites", full / best, 3.0, why=_most(best / without)),
    )
    header = ("way", "tokens/s", "÷ forward with logits", "÷ forward without")
    text = note(__doc__) + SAELENS + missing("h5py", "nnsight", "torchlens")
    return Table("Harvest", text, header, rows, goals, "tokens/s")


def _most(peer: float) -> str:
    return f"that peer reaches {peer:.2f} of the forward pass without unembedding: {1 / peer:.1f} × is all there is"


def cached(model: Model, batch: torch.Tensor) -> Cache:
    """Return the four sites by `run_with_cache`, in float16."""
    module: Any = model.module
    names = [f"blocks.{layer}.{LAYER_SITES[site]}" for layer in range(model.n_layers) for site in SITES]
    with torch.inference_mode():
        _, cache = module.run_with_cache(batch, names_filter=names)
    return {name: cache[name].half() for name in names}


def bridge_ways(model: Model, batch: torch.Tensor, folder: Path) -> dict[str, Callable[[], Any]]:
    """Return the peers that store the same four sites of one batch by `run_with_cache`."""
    import zarr

    def save_torch() -> None:
        torch.save(cached(model, batch), folder / "0.pt")

    def save_zarr() -> None:
        group = zarr.open_group(folder / "x.zarr", mode="w")
        for name, value in cached(model, batch).items():
            group.create_array(name, data=value.numpy())

    ways: dict[str, Callable[[], Any]] = {
        "run_with_cache + torch.save": save_torch,
        "run_with_cache + zarr-python": save_zarr,
    }
    found = peers("h5py")
    if "h5py" in found:

        def save_h5py() -> None:
            with found["h5py"].File(folder / "x.h5", "w") as file:
                for name, value in cached(model, batch).items():
                    file.create_dataset(name, data=value.numpy())

        ways["run_with_cache + h5py"] = save_h5py
    return ways


def plain_ways(model: Model, batch: torch.Tensor, folder: Path) -> dict[str, Callable[[], Any]]:
    """Return the peers that are installed and go through the Hugging Face model inside the bridge, for one batch."""
    plain: Any = getattr(model.module, "original_model", None)
    ways: dict[str, Callable[[], Any]] = {
        "output_hidden_states/attentions + npz": lambda: hidden_states(plain, batch, folder)
    }
    found = peers("nnsight", "torchlens")
    if "nnsight" in found:
        ways["nnsight cache + safetensors"] = lambda: nnsight_cache(found["nnsight"], plain, batch, folder)
    if "torchlens" in found:
        ways["torchlens + torch.save"] = lambda: torchlens_trace(found["torchlens"], plain, batch, folder)
    return ways


def hidden_states(plain: Any, batch: torch.Tensor, folder: Path) -> None:
    """Store the residual stream and the patterns as Transformers returns them."""
    with torch.inference_mode():
        out = plain(batch, output_hidden_states=True, output_attentions=True)
    arrays = {f"hidden_{i}": value.half().numpy() for i, value in enumerate(out.hidden_states)}
    np.savez(folder / "x.npz", **arrays, **{f"pattern_{i}": v.half().numpy() for i, v in enumerate(out.attentions)})


def nnsight_cache(nnsight: Any, plain: Any, batch: torch.Tensor, folder: Path) -> None:
    """Store what nnsight caches of each block: its output, the MLP's activations and the attention's outputs."""
    from safetensors.torch import save_file

    traced = nnsight.NNsight(plain)
    blocks = traced.transformer.h
    modules = [module for block in blocks for module in (block, block.mlp.act, block.attn)]
    with torch.inference_mode(), traced.trace(batch) as tracer:
        cache = tracer.cache(modules=modules)
    held = {}
    for name in list(cache.keys()):
        output = cache[name].output
        values = output if isinstance(output, tuple) else (output,)
        held |= {f"{name}.{i}": v.half().contiguous() for i, v in enumerate(values) if isinstance(v, torch.Tensor)}
    save_file(held, folder / "x.safetensors")


def torchlens_trace(torchlens: Any, plain: Any, batch: torch.Tensor, folder: Path) -> None:
    """Store as many softmax, reshape, mul and add outputs of the logged operations as there are layers."""
    with torch.no_grad():
        unbounded = torchlens.options.CaptureOptions(save_budget=None)  # by default half of what memory is free
        trace = torchlens.trace(plain, batch, capture=unbounded)
    n_layers, kept = len(plain.transformer.h), {}
    for kind in ("softmax", "reshape", "mul", "add"):
        labels = [label for label in trace.layer_labels if label.startswith(kind)]
        kept |= {label: trace[label].out.half() for label in labels[-n_layers:]}
    torch.save(kept, folder / "x.pt")


def _assert_equal(run: actdb.Run, cache: Cache, n_layers: int) -> None:
    for site in SITES:
        for layer in range(n_layers):
            value = cache[f"blocks.{layer}.{LAYER_SITES[site]}"][3].float().numpy()
            stored = run[site].sel(layer=layer, prompt=3).numpy().astype(np.float32)
            assert np.allclose(stored, value.transpose(1, 0, 2) if site == "z" else value, atol=2e-3), site


def make_inputs(model: Model, n_batches: int) -> tuple[torch.Tensor, list[dict[str, list[int]]]]:
    """Return random token ids [batch, prompt, pos], and the same as prompts to harvest."""
    shape = (n_batches, BATCH, TOKENS)
    ids = torch.from_numpy(np.random.default_rng(0).integers(0, int(model.config["d_vocab"]), shape))
    return ids, [{"tokens": prompt.tolist()} for batch in ids for prompt in batch]


def make_model(size: str, folder: Path) -> Model:
    """Return GPT-2-small's shape with random weights, and for the tiny size one of one layer."""
    if size != "tiny":
        return load_model("gpt2-small", random_init=0)
    return tiny_model(folder)


def tiny_model(folder: Path, *, n_ctx: int = TOKENS) -> Model:
    """Return a one-layer GPT-2 with random weights."""
    from transformers import GPT2Config

    config = GPT2Config(
        n_layer=1, n_embd=16, n_head=2, vocab_size=50, n_positions=n_ctx, bos_token_id=0, eos_token_id=0
    )
    config.architectures = ["GPT2LMHeadModel"]
    config.save_pretrained(folder / "model")
    return load_model(folder / "model", random_init=0)
