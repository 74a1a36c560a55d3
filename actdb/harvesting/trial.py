"""Trials before a harvest writes anything: that values fit the stored dtype, and that batches fit the memory."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from actdb.errors import SettingError
from actdb.harvesting.capture import PaddedBatch, pad_batch, run_batch, site_hooks
from actdb.harvesting.harvest import Harvest
from actdb.harvesting.pipeline import range_error
from actdb.harvesting.sites import LOGITS, HarvestSite
from actdb.harvesting.statistics import Hook
from actdb.harvesting.weights import model_readout

LENS_TOLERANCE = {"float32": 1e-4, "float16": 2e-2, "bfloat16": 1e-1}
"""Share of the largest |ln p| by which a lens of the last layer may miss the model's own."""


def make_batch(harvest: Harvest, prompt_ids: Sequence[int]) -> PaddedBatch:
    """Pad prompts as the harvest stores them."""
    return pad_batch(
        [harvest.tokens.prompt(prompt_id) for prompt_id in prompt_ids],
        device=harvest.model.device,
        masked=harvest.model.takes_mask,
        causal=harvest.probe.causal,
        positions=harvest.settings.positions,
        packed=any(site.kind == "entry" for site in harvest.sites),
        prompt_ids=prompt_ids,
    )


def run_planned(harvest: Harvest, batch: PaddedBatch, hooks: Sequence[Hook]) -> None:
    """Run the model over a batch as the harvest does, with its interventions, up to where nothing more is needed."""
    run_batch(
        harvest.model,
        batch,
        hooks,
        interventions=harvest.interventions,
        unembed=harvest.needs_unembed,
        end=harvest.end,
    )


def check_range(harvest: Harvest) -> None:
    """Run one prompt of each length bucket (a power of two) and refuse values that the stored dtype cannot hold."""
    limits = {spec.name: float(np.finfo(spec.dtype).max) for spec in harvest.info.sites if spec.dtype == "float16"}
    if not limits or harvest.model.dtype == "float16":
        return
    longest: dict[int, int] = {}
    for prompt_id, length in enumerate(harvest.tokens.lengths.tolist()):
        bucket = length.bit_length()
        if length > harvest.tokens.lengths[longest.get(bucket, prompt_id)] or bucket not in longest:
            longest[bucket] = prompt_id
    for prompt_id in longest.values():
        batch = make_batch(harvest, (prompt_id,))

        def check(site: HarvestSite, index: int, block: torch.Tensor) -> None:
            largest = float(block.abs().amax()) if block.numel() else 0.0
            if site.name in limits and not largest <= limits[site.name]:
                raise range_error(site.name, site.layers[index] if site.layers else None, "float16", largest)

        wide = dict.fromkeys((site.name for site in harvest.sites), "float32")
        kept = [site for site in harvest.sites if site.transform is None]
        run_planned(harvest, batch, site_hooks(kept, batch, wide, check))


def check_lens(harvest: Harvest) -> None:
    """Refuse lens statistics of a model that does more to its logits than norm(resid_post) W_U + b_U."""
    readout = model_readout(harvest.model) if "lens" in harvest.info.plan["statistics"] else None
    if readout is None:
        return
    batch = make_batch(harvest, (int(harvest.tokens.lengths.argmax()),))
    seen: dict[str, torch.Tensor] = {}
    points = harvest.probe.residual_points
    hooks = [
        (points[max(points)], lambda tensor: seen.update(residual=tensor[0].float().clone())),
        (harvest.model.hook_points[LOGITS], lambda tensor: seen.update(logits=tensor[0].float().clone())),
    ]
    run_batch(harvest.model, batch, hooks, unembed=True)
    own = seen["logits"].log_softmax(-1)
    difference = float((readout.logits(seen["residual"]).log_softmax(-1) - own).abs().max())
    if not difference <= LENS_TOLERANCE[harvest.model.dtype] * float(own.abs().max()):
        raise SettingError(
            f"--stats lens: the logits of {harvest.model.name} are not norm(resid_post) W_U + b_U (their logarithms "
            f"differ by {difference:.3g}): a cap or a scale follows. Leave lens out"
        )


def check_memory(harvest: Harvest) -> None:
    """Refuse a plan whose largest batch does not fit, naming a `--batch-tokens` that does.

    On an accelerator the batch is run, and halved until it fits; on a CPU, where a process that asks for too much is
    killed without a word, its size is estimated and compared with the memory that is free.
    """
    largest = max(harvest.layout.batches, key=lambda batch: _estimated_bytes(harvest, batch.prompt_ids)).prompt_ids
    fits = _is_estimated_to_fit(harvest) if harvest.model.device.type == "cpu" else _runs(harvest)
    kept = _largest_fitting(largest, fits)
    if kept == len(largest):
        return
    longest = int(harvest.tokens.lengths[list(largest)].max())
    if kept == 0:
        raise SettingError(f"one prompt of {longest} tokens does not fit the memory; choose a smaller --max-length")
    raise SettingError(
        f"a batch of {len(largest)} prompts of {longest} tokens does not fit the memory; "
        f"choose --batch-tokens {kept * longest}, which does"
    )


def _largest_fitting(prompt_ids: Sequence[int], fits: Callable[[Sequence[int]], bool]) -> int:
    """Return how many of the prompts fit, found by halving: all of them, or a power of two less, down to none."""
    count = len(prompt_ids)
    while count and not fits(prompt_ids[-count:]):
        count //= 2
    return count


def _runs(harvest: Harvest) -> Callable[[Sequence[int]], bool]:
    """Return a function that runs a batch with everything captured, and says whether the memory was enough."""

    def fits(prompt_ids: Sequence[int]) -> bool:
        try:
            batch = make_batch(harvest, prompt_ids)
            dtypes = {spec.name: spec.dtype for spec in harvest.info.sites}
            run_planned(harvest, batch, site_hooks(harvest.sites, batch, dtypes, lambda site, index, block: None))
        except torch.OutOfMemoryError:
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            return False
        return True

    return fits


def _is_estimated_to_fit(harvest: Harvest) -> Callable[[Sequence[int]], bool]:
    """Return a function that compares a batch's estimated memory with what is free."""
    free = _available_bytes()
    return lambda prompt_ids: free is None or _estimated_bytes(harvest, prompt_ids) <= free


def _estimated_bytes(harvest: Harvest, prompt_ids: Sequence[int]) -> int:
    """Estimate the memory of a batch's forward pass above the model, in bytes.

    Alive at once are at most some 8 residual streams, 4 MLP layers, 4 attention patterns (scores, mask, softmax, its
    copy) and, where the unembedding runs, 2 copies of the logits, beside one layer's blocks in the stored dtype.
    """
    config, longest = harvest.model.config, int(harvest.tokens.lengths[list(prompt_ids)].max())
    n_rows = len(prompt_ids) * longest
    width = 8 * int(config["d_model"] or 0) + 4 * int(config["d_mlp"] or 0)
    width += 2 * int(config["d_vocab"] or 0) if harvest.needs_unembed else 0
    if "lens" in harvest.info.plan["statistics"]:
        width += int(config["d_model"] or 0) * (harvest.model.n_layers + 4)
    squares = 4 * int(config["n_heads"] or 0) * len(prompt_ids) * longest**2
    return (n_rows * width + squares) * (2 if harvest.model.dtype in ("float16", "bfloat16") else 4)


def _available_bytes() -> int | None:
    """Return the memory that can be had without swapping; None where the system does not tell."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)
