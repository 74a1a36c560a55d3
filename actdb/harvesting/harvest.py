"""A harvest from beginning to end: load, tokenise, probe, plan, claim the run, compute its parts."""

import platform
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

from actdb.errors import ModelError, RunError, SettingError, SpaceError
from actdb.harvesting import plan as planning
from actdb.harvesting.capture import Intervention, PaddedBatch, pad_batch, run_batch, site_hooks
from actdb.harvesting.models import Model, load_model, weights_sha256
from actdb.harvesting.pipeline import PartWriter, Writers, planned_parts, range_error
from actdb.harvesting.prompts import Prompts, Tokenised, read_prompts, token_texts, tokenise
from actdb.harvesting.settings import Settings
from actdb.harvesting.sites import HarvestSite, Probe, probe
from actdb.harvesting.statistics import HeadStatistics
from actdb.harvesting.weights import output_grams, weight_tensors, write_weights
from actdb.schema import Commit, FileRecord, RunInfo, SiteSpec, digest
from actdb.storage import codecs, commits, verify
from actdb.storage.folder import Folder, readable_bytes, write_error

TOP_SITES = ("pattern_value", "pattern_index")
HEADROOM_BYTES = 16 * 1024**2


@dataclass(frozen=True)
class Harvest:
    """A planned harvest: everything known before the first forward pass over the prompts."""

    model: Model
    prompts: Prompts
    tokens: Tokenised
    probe: Probe
    sites: tuple[HarvestSite, ...]
    layout: planning.Layout
    info: RunInfo
    settings: Settings
    interventions: tuple[Intervention, ...]

    @property
    def raw_bytes(self) -> dict[str, int]:
        """Bytes of each site before encoding."""
        return {spec.name: planning.raw_bytes(spec, self.layout) for spec in self.info.sites}


@dataclass(frozen=True)
class Progress:
    """What a harvest has done since it began; given to the progress callback after each batch."""

    n_tokens: int
    n_tokens_planned: int
    stored_bytes: int
    n_parts: int
    n_parts_planned: int


def plan_harvest(
    source: Any,
    prompts: str | Path | Iterable[Mapping[str, Any]] | Prompts,
    settings: Settings,
    *,
    hooks: Sequence[Intervention] = (),
) -> Harvest:
    """Load the model, tokenise, probe and plan; writes nothing."""
    if hooks and (settings.run is None or settings.hooks_id is None):
        raise SettingError("hooks= needs run= and a hooks_id= that names the intervention: both are recorded")
    checked = prompts if isinstance(prompts, Prompts) else read_prompts(prompts)
    model = load_model(
        source,
        tokenizer=settings.tokenizer,
        dtype=settings.dtype or "float32",
        device=settings.device,
        random_init=settings.random_init,
        processing=settings.processing,
    )
    if settings.dtype is not None and settings.dtype != model.dtype:
        raise SettingError(f"--dtype {settings.dtype}: the module given computes in {model.dtype}; convert it first")
    for name, _ in hooks:
        if name not in model.hook_points:
            raise SettingError(f"hooks: {model.name} has no hook point {name!r}")
    limits = [n for n in (settings.max_length, model.config["n_ctx"]) if n is not None]
    tokens = tokenise(
        checked,
        tokenizer=model.tokenizer,
        bos=settings.bos,
        limit=min(limits, default=None),
        d_vocab=model.config["d_vocab"],
        strict=settings.strict,
    )
    found = probe(model, settings.sites, layers=settings.layers)
    sites = _stored_sites(found, settings, n_ctx=int(tokens.lengths.max()))
    return _make_plan(model, checked, tokens, found, sites, settings, tuple(hooks))


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
    info = _claim(folder, harvest)
    missing, damaged = _pending(folder, harvest)
    pending = [*missing, *damaged]
    _check_space(folder.root, harvest, pending)
    if pending:
        _compute(folder, replace(harvest, info=info), sorted(pending), set(damaged), progress)
    folder.sweep()


def _stored_sites(found: Probe, settings: Settings, *, n_ctx: int) -> tuple[HarvestSite, ...]:
    """Apply `--pattern`: packed, the top N of each query, or none."""
    sites: list[HarvestSite] = []
    for site in found.sites:
        if site.name != "pattern" or settings.pattern == "full":
            sites.append(site)
        elif settings.top is not None:
            for name, transform in zip(TOP_SITES, ("top_value", "top_index"), strict=True):
                sites.append(
                    replace(site, name=name, kind="row", width=settings.top, width_dim="rank", transform=transform)
                )
        elif settings.sites is not None:
            raise SettingError("--pattern none, but --sites names pattern: leave one of them out")
    return tuple(sites)


def _make_plan(
    model: Model,
    prompts: Prompts,
    tokens: Tokenised,
    found: Probe,
    sites: tuple[HarvestSite, ...],
    settings: Settings,
    interventions: tuple[Intervention, ...],
) -> Harvest:
    store = settings.store or ("float16" if model.dtype in ("float32", "float16") else "float32")
    codecs.check_precision(settings.precision, store)
    batch_tokens = settings.batch_tokens or planning.BATCH_TOKENS.get(model.device.type, planning.BATCH_TOKENS["cuda"])
    n_rows, n_entries = planning.stored_counts(tokens.lengths, causal=found.causal, positions=settings.positions)
    totals = {"row": int(n_rows.sum()), "entry": int(n_entries.sum()), "prompt": len(prompts)}
    dtypes = {site.name: _stored_dtype(site, store, int(tokens.lengths.max())) for site in sites}
    chunks = {
        site.name: planning.chunk_length(
            np.dtype(dtypes[site.name]).itemsize * (1 if site.kind == "entry" else site.width),
            planning.plane_count(site),
            totals[site.kind],
        )
        for site in sites
    }
    part_rows, part_entries = planning.part_limits(
        sites,
        store_bytes=np.dtype(store).itemsize,
        n_parameters=sum(p.numel() for p in model.module.parameters()),
        device_kind=model.device.type,
        part_tokens=settings.part_tokens,
    )
    layout = planning.make_layout(
        tokens.lengths,
        causal=found.causal,
        positions=settings.positions,
        batch_tokens=batch_tokens,
        equal_length=(not found.causal and not model.takes_mask) or any(site.kind == "prompt" for site in sites),
        part_rows=part_rows,
        part_entries=part_entries,
        row_multiple=max((chunks[s.name] for s in sites if s.kind != "entry"), default=1),
        entry_multiple=max((chunks[s.name] for s in sites if s.kind == "entry"), default=1),
    )
    specs = tuple(
        planning.site_spec(
            site,
            layout,
            chunk=chunks[site.name],
            dtype=dtypes[site.name],
            codec=settings.codec,
            precision=settings.precision,
        )
        for site in sites
    )
    plan = {
        "model": dict(model.config),
        "weights_sha256": weights_sha256(model),
        **model.processing,
        "random_seed": settings.random_init,
        "step": settings.step,
        "hooks_id": settings.hooks_id,
        "prompt_set": prompts.prompt_set,
        "n_tokens": int(tokens.lengths.sum()),
        "tokens_sha256": digest([tokens.ids.tolist(), tokens.starts.tolist()]),
        "bos": bool(settings.bos and model.tokenizer is not None),
        "max_length": settings.max_length,
        "dtype": model.dtype,
        "store": store,
        "positions": settings.positions,
        "pattern": settings.pattern,
        "causal": found.causal,
        "statistics": _statistics(found, settings),
        "batch_tokens": batch_tokens,
        "batches_sha256": digest([[batch.part, *batch.prompt_ids] for batch in layout.batches]),
        "sites": [spec.to_json() for spec in specs],
    }
    info = RunInfo(
        name=settings.run_name(model.name),
        plan_hash=digest(plan),
        plan=plan,
        model=dict(model.config),
        sites=specs,
        n_parts=layout.n_parts,
        n_prompts=len(prompts),
        n_rows=totals["row"],
        n_entries=totals["entry"],
        files=(),
        environment=_environment(model),
    )
    return Harvest(model, prompts, tokens, found, sites, layout, info, settings, interventions)


def _statistics(found: Probe, settings: Settings) -> list[str]:
    """Return the statistics to compute: heads where the model has attention, unless others were chosen."""
    has_heads = bool(found.pattern_points or found.z_points)
    if settings.stats is None:
        return ["heads"] if has_heads else []
    if "heads" in settings.stats and not has_heads:
        raise SettingError("--stats heads: this model shows neither attention patterns nor z")
    return list(settings.stats)


def _stored_dtype(site: HarvestSite, store: str, n_ctx: int) -> str:
    if site.transform == "top_index":
        return "uint16" if n_ctx < 2**16 else "uint32"
    return store


def _environment(model: Model) -> dict[str, Any]:
    import transformer_lens

    from actdb.version import __version__

    name = torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else platform.machine()
    return {
        "device": f"{model.device.type} ({name})",
        "threads": torch.get_num_threads(),
        "created_at": datetime.now(UTC).isoformat(timespec="microseconds"),
        "actdb_version": __version__,
        "python_version": platform.python_version(),
        "torch_version": str(torch.__version__),
        "transformer_lens_version": str(getattr(transformer_lens, "__version__", "")) or _version("transformer-lens"),
    }


def _version(package: str) -> str:
    from importlib.metadata import version

    return version(package)


def _claim(folder: Folder, harvest: Harvest) -> RunInfo:
    """Write the run's own files and claim its name, or check that a run of that name has the same plan."""
    info = harvest.info
    if not folder.exists(f"{commits.RUNS}/{info.name}/run.json"):
        with _run_files(folder, harvest) as files:
            info = replace(info, files=files.records)
            if commits.claim_run(folder, info):
                files.adopt()
                return info
    existing = commits.read_run(folder, info.name)
    if existing.plan_hash != info.plan_hash:
        raise RunError(
            f"run {info.name!r} exists with another plan ({_differences(existing.plan, info.plan)}); "
            "choose another name with --run"
        )
    bad = {damage.path for damage in verify.check_run_files(folder, existing)}
    if bad:
        with _run_files(folder, harvest) as files:
            files.adopt()
    for damage in verify.check_run_files(folder, existing):
        raise RunError(f"{damage.message}, and was not repaired: it was made with other library versions")
    return existing


class _run_files:
    """The files of a run outside its parts, written under temporary names until the run's name is claimed."""

    def __init__(self, folder: Folder, harvest: Harvest) -> None:
        self._folder, self._harvest = folder, harvest
        self._tables: dict[str, Path] = {}
        self.records: tuple[FileRecord, ...] = ()

    def __enter__(self) -> "_run_files":
        import pyarrow.parquet as pq

        from actdb.storage.folder import file_record, temporary_path

        run = self._harvest.info.name
        try:
            for table, content in run_tables(self._harvest).items():
                name = f"{commits.RUNS}/{run}/{table}.parquet"
                path = temporary_path(self._folder.path(name))
                path.parent.mkdir(parents=True, exist_ok=True)
                self._tables[name] = path
                pq.write_table(content, path, compression="zstd")
                self.records += (file_record(path, name),)
            layers = sorted({layer for site in self._harvest.sites for layer in site.layers})
            layers = layers or list(self._harvest.settings.layers or range(self._harvest.model.n_layers))
            tensors = weight_tensors(self._harvest.model, layers)
            self.records += write_weights(self._folder, str(self._harvest.info.plan["weights_sha256"]), tensors)
        except OSError as exc:
            self.__exit__()
            raise write_error(exc, str(self._folder.root)) from exc
        return self

    def adopt(self) -> None:
        """Give the files their names, and write the Zarr metadata."""
        import os

        for name, path in self._tables.items():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
            self._folder.adopt(path, name)
        for name, content in verify.metadata_files(self._harvest.info).items():
            if not self._folder.exists(name) or self._folder.read_bytes(name) != content:
                self._folder.publish(name, content)

    def __exit__(self, *_: object) -> None:
        for path in self._tables.values():
            path.unlink(missing_ok=True)


def run_tables(harvest: Harvest) -> dict[str, Any]:
    """Return the run's `prompts` (with where each prompt is stored) and `tokens` as pyarrow tables."""
    import pyarrow as pa

    layout, prompts, tokens = harvest.layout, harvest.prompts, harvest.tokens
    ids = pa.array(np.arange(len(prompts), dtype=np.int32))
    columns: dict[str, Any] = {"prompt_id": ids, "text": pa.array(prompts.texts, pa.string())}
    if prompts.labels:
        arrays = [pa.array(values) for values in prompts.labels.values()]
        columns["labels"] = pa.StructArray.from_arrays(arrays, names=list(prompts.labels))
    columns |= {
        "n_tokens": pa.array(tokens.lengths.astype(np.int32)),
        "truncated": pa.array(tokens.truncated),
        "part": pa.array(layout.parts),
        "row_start": pa.array(layout.row_starts),
        "n_rows": pa.array(layout.n_rows),
        "entry_start": pa.array(layout.entry_starts),
        "n_entries": pa.array(layout.n_entries),
    }
    texts = token_texts(tokens.ids, harvest.model.tokenizer)
    lengths = tokens.lengths
    token_columns = {
        "prompt_id": np.repeat(np.arange(len(prompts), dtype=np.int32), lengths),
        "pos": (np.arange(len(tokens.ids)) - np.repeat(tokens.starts[:-1], lengths)).astype(np.int32),
        "token_id": tokens.ids,
        "token": pa.array([texts[token] for token in tokens.ids.tolist()], pa.string()),
    }
    return {"prompts": pa.table(columns), "tokens": pa.table(token_columns)}


def _differences(existing: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    keys = sorted(key for key in {*existing, *new} if existing.get(key) != new.get(key))
    return "different " + ", ".join(keys) if keys else "different plan"


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
    writers = Writers()
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
