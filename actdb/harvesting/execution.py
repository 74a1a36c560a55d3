"""Carrying a planned harvest out: its name claimed, its missing or damaged parts computed and committed."""

import shutil
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from actdb.errors import ModelError, SpaceError
from actdb.harvesting import plan as planning
from actdb.harvesting.capture import PaddedBatch, pad_batch, run_batch, site_hooks
from actdb.harvesting.claim import claim_run
from actdb.harvesting.harvest import Harvest
from actdb.harvesting.pipeline import HELD_BYTES, PartWriter, Writers, planned_parts, range_error
from actdb.harvesting.sites import HarvestSite
from actdb.harvesting.statistics import HeadStatistics
from actdb.harvesting.weights import output_grams
from actdb.schema import Commit, RunInfo, SiteSpec
from actdb.storage import commits, verify
from actdb.storage.folder import Folder, readable_bytes

HEADROOM_BYTES = 16 * 1024**2


@dataclass(frozen=True)
class Progress:
    """What a harvest has done since it began; given to the progress callback after each batch."""

    n_tokens: int
    n_tokens_planned: int
    stored_bytes: int
    n_parts: int
    n_parts_planned: int


def run_harvest(harvest: Harvest, out: str | Path, *, progress: Callable[[Progress], None] | None = None) -> None:
    """Carry a plan out into a database: claim the run, compute the parts that are missing or damaged.

    Raises `RunError` where the name is taken by another plan, and before anything is written `SpaceError` where the
    disk is too small and `OverflowingError` where `--store` is too narrow.
    """
    if not Path(out, commits.RUNS, harvest.info.name, "run.json").exists():
        _check_space(Path(out), harvest, range(harvest.info.n_parts))
        _check_range(harvest)
    folder = Folder.create(out)
    folder.sweep()
    info = claim_run(folder, harvest)
    missing, damaged = _pending(folder, harvest)
    pending = [*missing, *damaged]
    _check_space(folder.root, harvest, pending)
    if pending:
        _compute(folder, replace(harvest, info=info), sorted(pending), set(damaged), progress)
    folder.sweep()


def _pending(folder: Folder, harvest: Harvest) -> tuple[list[int], list[int]]:
    """Return the parts of this worker that are not committed, and those whose files are damaged."""
    committed = set(commits.committed_parts(folder, harvest.info.name))
    missing, damaged = [], []
    for part in planned_parts(harvest.info.n_parts, harvest.settings.worker):
        if part not in committed:
            missing.append(part)
        elif not _intact(folder, harvest.info, part):
            damaged.append(part)
    return missing, damaged


def _intact(folder: Folder, info: RunInfo, part: int) -> bool:
    from actdb.errors import DamageError

    try:
        commit = commits.read_commit(folder, info.name, part)
    except DamageError:
        return False
    if commit.part != part or commit.plan_hash != info.plan_hash:
        return False
    return next(verify.check_commit(folder, info, commit), None) is None


def _check_space(out: Path, harvest: Harvest, parts: Sequence[int]) -> None:
    """Refuse a harvest whose raw bytes do not fit the disk; encoding only makes them fewer."""
    if not len(parts):
        return
    needed = sum(planning.raw_bytes(spec, harvest.layout, parts) for spec in harvest.info.sites)
    there = next(path for path in (out, *out.absolute().parents) if path.exists())
    free = shutil.disk_usage(there).free
    if needed + HEADROOM_BYTES > free:
        raise SpaceError(
            f"the harvest needs up to {readable_bytes(needed)} and {out} has {readable_bytes(free)} free; "
            "choose fewer --sites or --layers, --positions last, or another -o"
        )


def _check_range(harvest: Harvest) -> None:
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
        batch = _batch(harvest, (prompt_id,))

        def check(site: HarvestSite, index: int, block: torch.Tensor) -> None:
            largest = float(block.abs().amax()) if block.numel() else 0.0
            if site.name in limits and not largest <= limits[site.name]:
                raise range_error(site.name, site.layers[index] if site.layers else None, "float16", largest)

        wide = dict.fromkeys((site.name for site in harvest.sites), "float32")
        kept = [site for site in harvest.sites if site.transform is None]
        hooks = site_hooks(kept, batch, wide, check)
        run_batch(harvest.model, batch, hooks, interventions=harvest.interventions, unembed=harvest.probe.needs_unembed)


def _batch(harvest: Harvest, prompt_ids: Sequence[int]) -> PaddedBatch:
    return pad_batch(
        [harvest.tokens.prompt(prompt_id) for prompt_id in prompt_ids],
        model=harvest.model,
        causal=harvest.probe.causal,
        positions=harvest.settings.positions,
        packed=any(site.kind == "entry" for site in harvest.sites),
    )


def _compute(
    folder: Folder,
    harvest: Harvest,
    parts: Sequence[int],
    damaged: set[int],
    progress: Callable[[Progress], None] | None,
) -> None:
    """Compute parts one after the other; the writers work behind the model."""
    specs: dict[str, SiteSpec] = {spec.name: spec for spec in harvest.info.sites}
    dtypes = {name: spec.dtype for name, spec in specs.items()}
    layers = sorted({*harvest.probe.pattern_points, *harvest.probe.z_points})
    grams = output_grams(harvest.model, layers) if "heads" in harvest.info.plan["statistics"] else {}
    lengths = harvest.tokens.lengths
    planned = sum(int(lengths[harvest.layout.parts == part].sum()) for part in parts)
    done = {"tokens": 0, "bytes": 0, "parts": 0}
    writers = Writers(lockstep=harvest.model.device.type == "cpu")
    open_parts: list[PartWriter] = []

    def report() -> None:
        if progress is not None:
            progress(Progress(done["tokens"], planned, done["bytes"], done["parts"], len(parts)))

    try:
        for part in parts:
            writer = PartWriter(folder, harvest.info, part, writers, computed_dtype=harvest.model.dtype)
            open_parts.append(writer)
            statistics = _part_statistics(harvest, grams)
            for planned_batch in harvest.layout.part_batches(part):
                batch = _batch(harvest, planned_batch.prompt_ids)
                _run_part_batch(harvest, batch, planned_batch.prompt_ids, writer, statistics, dtypes)
                writers.settle()
                done["tokens"] += batch.n_tokens
                report()

            def committed(commit: Commit, writer: PartWriter = writer) -> None:
                open_parts.remove(writer)
                done["parts"] += 1
                done["bytes"] += sum(record.stored_bytes for record in commit.files)

            tables = {} if statistics is None else {"head_stats": statistics}
            writer.finish(
                lambda tables=tables: {name: held.table() for name, held in tables.items()},  # type: ignore[misc]
                replace=part in damaged,
                done=committed,
            )
        writers.close()
        report()
    except BaseException:
        if sys.exc_info()[0] is not None:
            writers.abort()
            for writer in open_parts:
                writer.abandon()
        raise


def _part_statistics(harvest: Harvest, grams: Mapping[int, torch.Tensor]) -> HeadStatistics | None:
    if "heads" not in harvest.info.plan["statistics"]:
        return None
    return HeadStatistics(harvest.probe.pattern_points, harvest.probe.z_points, grams)


def _run_part_batch(
    harvest: Harvest,
    batch: PaddedBatch,
    prompt_ids: tuple[int, ...],
    writer: PartWriter,
    statistics: HeadStatistics | None,
    dtypes: Mapping[str, str],
) -> None:
    received = Counter[str]()

    def receive(site: HarvestSite, index: int, block: torch.Tensor) -> None:
        received[site.name] += 1
        writer.append(site.name, index, block.cpu().numpy())
        writer.writers.settle(least_bytes=HELD_BYTES)

    hooks = site_hooks(harvest.sites, batch, dtypes, receive)
    collect = None
    if statistics is not None:
        more, collect = statistics.hooks(batch)
        hooks += more
    run_batch(harvest.model, batch, hooks, interventions=harvest.interventions, unembed=harvest.probe.needs_unembed)
    for site in harvest.sites:
        if received[site.name] != len(site.points):
            raise ModelError(
                f"{harvest.model.name} passed site {site.name!r} {received[site.name]} times in a batch, but "
                f"{len(site.points)} times in the probe: what it computes depends on its input, which cannot be stored"
            )
    if collect is not None:
        collect(prompt_ids)
