"""The plan of a harvest: model loaded, prompts tokenised, sites probed, arrays laid out. Writes nothing."""

import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

from actdb.errors import SettingError
from actdb.harvesting import plan as planning
from actdb.harvesting.capture import Intervention
from actdb.harvesting.models import Model, load_model, weights_sha256
from actdb.harvesting.prompts import Prompts, Tokenised, has_start, read_prompts, tokenise
from actdb.harvesting.settings import Settings
from actdb.harvesting.sites import HarvestSite, Probe, probe
from actdb.harvesting.weights import model_readout
from actdb.schema import RunInfo, SiteSpec, digest
from actdb.storage import codecs

LACKING = {
    "heads": "neither attention patterns nor z",
    "neurons": "no mlp_post of d_mlp neurons",
    "tokens": "no logits",
    "lens": "no resid_post of every layer, no logits or no W_U",
}
TOP_SITES = ("pattern_value", "pattern_index")


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
    def needs_unembed(self) -> bool:
        """Whether a site or a statistic needs the logits; the unembedding is left out otherwise."""
        return self.probe.needs_unembed or "tokens" in self.info.plan["statistics"]

    @property
    def end(self) -> str | None:
        """The hook point where the layer after the last harvested one begins, if nothing is taken from there on."""
        layers, kept = self.probe.layers, self.info.plan["statistics"]
        if not layers or self.needs_unembed or not set(kept) <= {"heads", "neurons"}:
            return None
        if any(not site.layers and site.name != "embed" for site in self.sites):
            return None
        later = [f"blocks.{layer}." for layer in range(layers[-1] + 1, self.model.n_layers)]
        if any(name.startswith((*later, "ln_final", "unembed")) for name, _ in self.interventions):
            return None  # they may be there to look at what later layers do
        return f"{later[0]}hook_resid_pre" if later else None

    @property
    def raw_bytes(self) -> dict[str, int]:
        """Bytes of each site before encoding."""
        return {spec.name: planning.raw_bytes(spec, self.layout) for spec in self.info.sites}


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
    return make_plan(model, checked, tokens, found, sites, settings, tuple(hooks))


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


def make_plan(
    model: Model,
    prompts: Prompts,
    tokens: Tokenised,
    found: Probe,
    sites: tuple[HarvestSite, ...],
    settings: Settings,
    interventions: tuple[Intervention, ...],
) -> Harvest:
    """Lay the arrays out and write down everything that decides the stored bytes."""
    store = settings.store or ("float16" if model.dtype in ("float32", "float16") else "float32")
    codecs.check_precision(settings.precision, store)
    batch_tokens = settings.batch_tokens or planning.BATCH_TOKENS.get(model.device.type, planning.BATCH_TOKENS["cuda"])
    settings = replace(settings, store=store, batch_tokens=batch_tokens)
    layout, specs = _lay_out(model, tokens, found, sites, settings)
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
        "bos": settings.bos and has_start(model.tokenizer),
        "max_length": settings.max_length,
        "dtype": model.dtype,
        "store": store,
        "positions": settings.positions,
        "pattern": settings.pattern,
        "causal": found.causal,
        "statistics": _statistics(model, found, settings),
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
        n_rows=int(layout.n_rows.sum()),
        n_entries=int(layout.n_entries.sum()),
        files=(),
        environment=_environment(model),
    )
    return Harvest(model, prompts, tokens, found, sites, layout, info, settings, interventions)


def _lay_out(
    model: Model, tokens: Tokenised, found: Probe, sites: tuple[HarvestSite, ...], settings: Settings
) -> tuple[planning.Layout, tuple[SiteSpec, ...]]:
    """Return where every prompt is stored, and the array of each site."""
    store, lengths = str(settings.store), tokens.lengths
    n_rows, n_entries = planning.stored_counts(lengths, causal=found.causal, positions=settings.positions)
    totals = {"row": int(n_rows.sum()), "entry": int(n_entries.sum()), "prompt": len(lengths)}
    dtypes = {site.name: _stored_dtype(site, store, int(lengths.max())) for site in sites}
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
        lengths,
        causal=found.causal,
        positions=settings.positions,
        batch_tokens=int(settings.batch_tokens or 0),
        equal_length=(not found.causal and not model.takes_mask) or any(site.kind == "prompt" for site in sites),
        part_rows=part_rows,
        part_entries=part_entries,
        row_multiple=max((chunks[s.name] for s in sites if s.kind != "entry"), default=1),
        entry_multiple=max((chunks[s.name] for s in sites if s.kind == "entry"), default=1),
    )
    specs = [
        planning.site_spec(
            site,
            layout,
            chunk=chunks[site.name],
            dtype=dtypes[site.name],
            codec=settings.codec,
            precision=settings.precision,
        )
        for site in sites
    ]
    return layout, tuple(specs)


def _statistics(model: Model, found: Probe, settings: Settings) -> list[str]:
    """Return the statistics to compute: heads where the model has attention, neurons where `mlp_post` is harvested."""
    available = {
        "heads": bool(found.pattern_points or found.z_points),
        "neurons": bool(found.neuron_points),
        "tokens": found.has_logits,
        "lens": bool(found.residual_points) and found.has_logits and found.causal and model_readout(model) is not None,
    }
    if settings.stats is None:
        usual = {"heads": True, "neurons": any(site.name == "mlp_post" for site in found.sites)}
        return [name for name, wanted in usual.items() if wanted and available[name]]
    for name in settings.stats:
        if not available[name]:
            raise SettingError(f"--stats {name}: this model shows {LACKING[name]}")
    return [name for name in available if name in settings.stats]


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
