"""Carrying a planned harvest out: its name claimed, its missing or damaged parts computed and committed."""

import shutil
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from actdb.errors import ModelError, SpaceError
from actdb.harvesting import plan as planning
from actdb.harvesting.capture import PaddedBatch, site_hooks
from actdb.harvesting.claim import claim_run
from actdb.harvesting.handover import Handover
from actdb.harvesting.harvest import Harvest
from actdb.harvesting.pipeline import PartWriter, Writers, planned_parts
from actdb.harvesting.sites import LOGITS, HarvestSite
from actdb.harvesting.statistics import PartStatistic
from actdb.harvesting.statistics.choice import Constants, Points, make_statistics
from actdb.harvesting.trial import check_lens, check_memory, check_range, make_batch, run_planned
from actdb.harvesting.weights import WEIGHTS, model_readout, output_grams, output_weights
from actdb.schema import Commit, RunInfo
from actdb.storage import commits, verify
from actdb.storage.arrays import ARRAYS
from actdb.storage.folder import Folder, readable_bytes

MEBIBYTE = 1024**2
HEADROOM_BYTES = 16 * MEBIBYTE


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
    disk is too small, `OverflowingError` where `--store` is too narrow, and `SettingError` where a batch does not fit.
    """

    def try_out() -> None:
        check_range(harvest)
        check_lens(harvest)
        check_memory(harvest)

    fill_run(harvest, out, partial(_compute, progress=progress), before=try_out)


def fill_run(
    harvest: Harvest,
    out: str | Path,
    compute: Callable[[Folder, Harvest, Sequence[int], set[int]], None],
    *,
    before: Callable[[], None] = lambda: None,
) -> None:
    """Claim a run and let `compute` write the parts that are missing or damaged (given as a set besides).

    `before` is called before anything is written of a run that is not there yet. Raises `RunError` and `SpaceError` as
    `run_harvest` does.
    """
    if not Path(out, commits.RUNS, harvest.info.name, "run.json").exists():
        _check_space(Path(out), harvest, range(harvest.info.n_parts))
        before()
    folder = Folder.create(out)
    own = _own_folders(harvest)
    folder.sweep(*own)
    info = claim_run(folder, harvest)
    missing, damaged = _pending(folder, harvest)
    pending = [*missing, *damaged]
    _check_space(folder.root, harvest, pending)
    if pending:
        compute(folder, replace(harvest, info=info), sorted(pending), set(damaged))
    folder.sweep(*own)


def _own_folders(harvest: Harvest) -> list[str]:
    """Return where a run's files lie: to look through those of all runs would cost more with each further run."""
    name, sha256 = harvest.info.name, harvest.info.plan["weights_sha256"]
    return [f"{commits.RUNS}/{name}", f"{ARRAYS}/{name}", *([f"{WEIGHTS}/{sha256}"] if sha256 else [])]


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


def _compute(
    folder: Folder,
    harvest: Harvest,
    parts: Sequence[int],
    damaged: set[int],
    progress: Callable[[Progress], None] | None,
) -> None:
    """Compute parts one after the other; the writers work behind the model."""
    device, settings = harvest.model.device, harvest.settings
    new_statistics = statistics_of(harvest)
    tally = Tally(harvest, parts, progress)
    writers = Writers(lockstep=device.type == "cpu", pending_bytes=settings.buffer_mb * MEBIBYTE)
    handover = Handover(device, writers)
    try:
        for part in parts:
            writer = PartWriter(folder, harvest.info, part, writers, computed_dtype=harvest.model.dtype)
            statistics = new_statistics()
            for planned_batch in harvest.layout.part_batches(part):
                batch = make_batch(harvest, planned_batch.prompt_ids)
                receive = partial(handover.append, writer)
                _run_part_batch(harvest, batch, receive, statistics)
                writers.settle()
                tally.add(batch)
            handover.finish(
                partial(writer.finish, partial(_tables, statistics), replace=part in damaged, done=tally.commit)
            )
        handover.close()
        writers.close()
        tally.report()
    except BaseException:
        handover.abort()
        writers.abort()
        raise


class Tally:
    """What has been done, reported after each batch."""

    def __init__(self, harvest: Harvest, parts: Sequence[int], progress: Callable[[Progress], None] | None) -> None:
        planned = int(harvest.tokens.lengths[np.isin(harvest.layout.parts, parts)].sum())
        self._now = Progress(0, planned, 0, 0, len(parts))
        self._progress = progress
        self._lock = threading.Lock()

    def add(self, batch: PaddedBatch) -> None:
        """Count a batch that has run, and report."""
        with self._lock:
            self._now = replace(self._now, n_tokens=self._now.n_tokens + batch.n_tokens)
        self.report()

    def commit(self, commit: Commit) -> None:
        """Count a committed part; called by the writer thread."""
        stored = sum(record.stored_bytes for record in commit.files)
        with self._lock:
            now = self._now
            self._now = replace(now, stored_bytes=now.stored_bytes + stored, n_parts=now.n_parts + 1)

    def report(self) -> None:
        """Call the progress callback."""
        if self._progress is not None:
            self._progress(self._now)


def statistics_of(harvest: Harvest) -> Callable[[], list[PartStatistic]]:
    """Return what makes the statistics collectors of a part, with the constants of all parts computed once."""
    wanted, probed, model = harvest.info.plan["statistics"], harvest.probe, harvest.model
    headed = sorted({*probed.pattern_points, *probed.z_points})
    constants = Constants(
        grams=output_grams(model, headed) if "heads" in wanted else {},
        outputs=output_weights(model, headed) if "lens" in wanted else {},
        readout=model_readout(model) if "lens" in wanted else None,
    )
    points = Points(
        patterns=probed.pattern_points,
        z=probed.z_points,
        neurons=probed.neuron_points,
        residuals=probed.residual_points,
        logits=model.hook_points.get(LOGITS),
    )
    return lambda: make_statistics(wanted, points, constants, probed.layers)


def _tables(statistics: Sequence[PartStatistic]) -> dict[str, Any]:
    return {name: table for statistic in statistics for name, table in statistic.tables().items()}


def _run_part_batch(
    harvest: Harvest,
    batch: PaddedBatch,
    receive: Callable[[str, int, torch.Tensor], None],
    statistics: Sequence[PartStatistic],
) -> None:
    n_received = Counter[str]()

    def count(site: HarvestSite, index: int, block: torch.Tensor) -> None:
        n_received[site.name] += 1
        receive(site.name, index, block)

    dtypes = {spec.name: spec.dtype for spec in harvest.info.sites}
    hooks = site_hooks(harvest.sites, batch, dtypes, count)
    for statistic in statistics:
        hooks += statistic.hooks(batch)
    run_planned(harvest, batch, hooks)
    for site in harvest.sites:
        if n_received[site.name] != len(site.points):
            raise ModelError(
                f"{harvest.model.name} passed site {site.name!r} {n_received[site.name]} times in a batch, but "
                f"{len(site.points)} times in the probe: what it computes depends on its input, which cannot be stored"
            )
    for statistic in statistics:
        statistic.collect()
