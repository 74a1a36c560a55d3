"""How cost grows: tokens/s over 1×, 10×, 100× prompts, and over contexts from 64 to 1024 tokens, with bytes a token.

Prompts: a model of 4 layers of 128 dimensions, 8 heads, prompts of 64 tokens. Contexts: GPT-2-small's shape, 2048
tokens a batch; the forward pass (without unembedding) of the same batches beside it.
"""

import resource
import shutil
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from actdb.harvesting.execution import run_harvest
from actdb.harvesting.harvest import plan_harvest
from actdb.harvesting.models import Model, load_model
from actdb.harvesting.settings import Settings
from actdb.harvesting.sites import forward
from benchmarks.harness import Goal, Table, note, take_turns
from benchmarks.harvest import SHARED

PROMPTS = {"full": (128, 1280, 12_800), "quick": (128, 1280), "tiny": (4, 8)}
CONTEXTS = {"full": (64, 256, 1024), "quick": (64, 512), "tiny": (8, 16)}
TOKENS = 2048


def run(size: str, folder: Path) -> Table:
    """Return tokens/s, memory and bytes of each size."""
    rows = [*over_prompts(size, folder), *over_contexts(size, folder)]
    speeds = [row[2] for row in rows if row[0] == "prompts"]
    ratios = [row[3] for row in rows if row[0] == "context"]
    goals = (
        Goal("tokens/s at the most prompts ÷ at the fewest", speeds[-1] / speeds[0], 0.9),
        Goal("harvest ÷ forward without unembedding, worst context", min(ratios), 0.9, why=SHARED),
    )
    header = ("over", "size", "tokens/s", "÷ forward without", "stored bytes a token", "peak MiB of the process")
    return Table("Growth", note(__doc__), header, rows, goals)


def over_prompts(size: str, folder: Path) -> list[tuple[Any, ...]]:
    """Harvest more and more prompts with a small model."""
    model, rows = small_model(folder), []
    generator = np.random.default_rng(0)
    for n_prompts in PROMPTS[size]:
        prompts = [{"tokens": ids.tolist()} for ids in generator.integers(0, 1000, (n_prompts, 64))]
        out = folder / f"{n_prompts}.actdb"
        began = time.perf_counter()
        run_harvest(plan_harvest(model.module, prompts, Settings()), out)
        speed = n_prompts * 64 / (time.perf_counter() - began)
        rows.append(("prompts", n_prompts, speed, "", stored(out) / (n_prompts * 64), peak_mb()))
        shutil.rmtree(out)
    return rows


def over_contexts(size: str, folder: Path) -> list[tuple[Any, ...]]:
    """Harvest longer and longer prompts, the same number of tokens."""
    model = small_model(folder) if size == "tiny" else load_model("gpt2-small", random_init=0)
    rows = []
    for context in CONTEXTS[size]:
        ids = torch.from_numpy(np.random.default_rng(0).integers(0, 1000, (max(TOKENS // context, 1), context)))
        ids = ids[:2] if size == "tiny" else ids
        prompts = [{"tokens": prompt.tolist()} for prompt in ids] * 2
        planned = plan_harvest(model.module, prompts, Settings())
        out = folder / "context.actdb"
        run_harvest(planned, out)
        size_bytes = stored(out)

        def clear(out: Path = out) -> None:
            for name in ("runs", "arrays.zarr"):
                shutil.rmtree(out / name, ignore_errors=True)

        def bare(ids: torch.Tensor = ids) -> None:
            for _ in range(2):
                forward(model, ids, torch.ones_like(ids), unembed=False)

        ways = {"actdb": partial(run_harvest, planned, out), "bare": bare}
        medians = take_turns(ways, rounds=1, before=clear)
        n_tokens, ratio = 2 * ids.numel(), medians["bare"] / medians["actdb"]
        rows.append(("context", context, n_tokens / medians["actdb"], ratio, size_bytes / n_tokens, peak_mb()))
        shutil.rmtree(out)
    return rows


def small_model(folder: Path) -> Model:
    """Return a small GPT-2 with random weights."""
    from transformers import GPT2Config

    config = GPT2Config(
        n_layer=4, n_embd=128, n_head=8, vocab_size=1000, n_positions=64, bos_token_id=0, eos_token_id=0
    )
    config.architectures = ["GPT2LMHeadModel"]
    config.save_pretrained(folder / "small")
    return load_model(folder / "small", random_init=0)


def stored(out: Path) -> int:
    """Return the bytes of the arrays."""
    return sum(path.stat().st_size for path in (out / "arrays.zarr").rglob("*") if path.is_file())


def peak_mb() -> float:
    """Return the peak resident size of this process so far, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
