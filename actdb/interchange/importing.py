"""Importing activations that were computed elsewhere: they become a run like any other, without a model.

What a harvest captures from hooks comes from tensors here; plan, parts, commits and checksums are the harvest's own. So
an import is resumed and repaired by the same command, and its plan names the content of the file.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from actdb.errors import OverflowingError, SettingError
from actdb.harvesting.capture import TORCH_DTYPES, PaddedBatch, pack
from actdb.harvesting.execution import MEBIBYTE, fill_run
from actdb.harvesting.harvest import Harvest, make_plan
from actdb.harvesting.models import FOLDINGS, Model, load_tokenizer
from actdb.harvesting.pipeline import PartWriter, Writers, range_error
from actdb.harvesting.prompts import read_prompts, tokenise
from actdb.harvesting.settings import Settings
from actdb.harvesting.sites import HarvestSite, Probe
from actdb.harvesting.trial import make_batch
from actdb.interchange.tensor_file import read_tensors
from actdb.interchange.tensor_site import STORES, FoundSites, find_sites
from actdb.schema import digest
from actdb.storage.folder import Folder

PADDINGS = ("right", "left")
BATCH_TOKENS = 2048
"""Padded tokens that are copied at once."""


@dataclass(frozen=True)
class Import:
    """A planned import: the run as a harvest without a model, and the tensors that it is filled from."""

    harvest: Harvest
    found: FoundSites
    padding: str


def plan_import(
    path: str | Path,
    prompts: str | Path | Iterable[Mapping[str, Any]],
    settings: Settings,
    *,
    model: str | None = None,
    padding: str = "right",
    pad_to: int | None = None,
    causal: bool | None = None,
) -> Import:
    """Read names and shapes, tokenise, and lay the run out; writes nothing."""
    if padding not in PADDINGS:
        raise SettingError(f"--padding {padding}: choose one of {', '.join(PADDINGS)}")
    source = Path(path)
    tensors = read_tensors(source)
    checked, tokenizer = read_prompts(prompts), load_tokenizer(settings.tokenizer)
    tokens = tokenise(checked, tokenizer=tokenizer, bos=settings.bos, limit=None, d_vocab=None, strict=True)
    longest = int(tokens.lengths.max())
    if pad_to is not None and pad_to < longest:
        raise SettingError(f"--pad-to {pad_to}: the longest prompt has {longest} tokens")
    found = find_sites(tensors, settings.sites, layers=settings.layers, n_prompts=len(checked), n_pos=pad_to or longest)
    looks_back = _looks_back(found, tokens.lengths.tolist(), padding)
    if causal and not looks_back:
        raise SettingError("--causal: the patterns of the file look ahead")
    stub = Model(
        module=torch.nn.Module(),
        name=model or source.stem,
        config=found.config(model or source.stem),
        tokenizer=tokenizer,
        hook_points={},
        call=_no_call,
        takes_mask=True,  # the tensors were computed already: pads do not matter
        device=torch.device("cpu"),
        dtype=found.dtype,
        processing={"processing": None, **dict.fromkeys(FOLDINGS), "imported_sha256": _sha256(source)},
    )
    probe = Probe(found.sites, looks_back if causal is None else causal, {}, {}, {}, False, False)
    copied = min(settings.part_tokens or BATCH_TOKENS, BATCH_TOKENS)  # a batch, which no part is smaller than
    stored = replace(settings, store=settings.store or _exact_store(found), stats=(), batch_tokens=max(copied, 1))
    planned = make_plan(stub, checked, tokens, probe, found.sites, stored, ())
    plan = {**planned.info.plan, "weights_sha256": None, "padding": padding}
    environment = {**planned.info.environment, "device": None, "threads": None}
    info = replace(planned.info, plan=plan, plan_hash=digest(plan), environment=environment)
    return Import(replace(planned, info=info), found, padding)


def run_import(planned: Import, out: str | Path) -> None:
    """Write the parts that are missing or damaged.

    Raises `RunError` where the run's name is taken by another plan, `OverflowingError` for a value that is not finite
    or that `--store` cannot hold, `SpaceError` for a disk too small; these before anything is written.
    """
    fill_run(planned.harvest, out, partial(_write_parts, planned), before=partial(_check_values, planned))


def _write_parts(planned: Import, folder: Folder, harvest: Harvest, parts: Sequence[int], damaged: set[int]) -> None:
    """Write parts one after the other."""
    writers = Writers(pending_bytes=harvest.settings.buffer_mb * MEBIBYTE)
    try:
        for part in parts:
            writer = PartWriter(folder, harvest.info, part, writers, computed_dtype=harvest.model.dtype)
            _fill_part(writer, planned, harvest)
            writer.finish(dict, replace=part in damaged, done=lambda commit: None)
        writers.close()
    except BaseException:
        writers.abort()
        raise


def _fill_part(writer: PartWriter, planned: Import, harvest: Harvest) -> None:
    """Append site after site and layer after layer, as the tensors lie."""
    batches = [make_batch(harvest, batch.prompt_ids) for batch in harvest.layout.part_batches(writer.part)]
    for site, spec in zip(harvest.sites, harvest.info.sites, strict=True):
        for index, name in enumerate(planned.found.names[site.name]):
            for batch in batches:
                values = gather(planned.found.tensors[name], site, batch, padding=planned.padding)
                writer.append(site.name, index, pack(site, values, batch, TORCH_DTYPES[spec.dtype]).numpy())


def gather(tensor: torch.Tensor, site: HarvestSite, batch: PaddedBatch, *, padding: str) -> torch.Tensor:
    """Return a batch's activations padded on the right to its longest prompt, from a tensor padded either way."""
    pieces = [
        valid_values(tensor, site, prompt, n, padding=padding)
        for prompt, n in zip(batch.prompt_ids, batch.lengths, strict=True)
    ]
    if site.kind == "prompt":
        return torch.stack(pieces)
    longest = max(batch.lengths)
    shape = (site.n_heads, longest, longest) if site.kind == "entry" else (longest, *tensor.shape[2:])
    out = tensor.new_zeros((len(pieces), *shape))
    for target, piece in zip(out, pieces, strict=True):
        place = (slice(None), *map(slice, piece.shape[1:])) if site.kind == "entry" else (slice(len(piece)),)
        target[place] = piece
    return out


def valid_values(tensor: torch.Tensor, site: HarvestSite, prompt: int, n: int, *, padding: str) -> torch.Tensor:
    """Return a view of one prompt's activations without pads: [pos, …], or a pattern [head, query, key]."""
    if site.kind == "prompt":
        return tensor[prompt]
    n_pos = tensor.shape[-1 if site.kind == "entry" else 1]
    span = slice(n_pos - n, n_pos) if padding == "left" else slice(n)
    return tensor[prompt, :, span, span] if site.kind == "entry" else tensor[prompt, span]


def _looks_back(found: FoundSites, lengths: Sequence[int], padding: str) -> bool:
    """Whether no pattern has weight above the diagonal; true where there are no patterns."""
    for site in (site for site in found.sites if site.kind == "entry"):
        for name in found.names[site.name]:
            for prompt, n in enumerate(lengths):
                pattern = valid_values(found.tensors[name], site, prompt, n, padding=padding)
                if torch.triu(pattern, diagonal=1).any():
                    return False
    return True


def _check_values(planned: Import) -> None:
    """Refuse values that are not finite or that the stored dtype cannot hold; what pads hold does not matter."""
    harvest, found = planned.harvest, planned.found
    for site, spec in zip(harvest.sites, harvest.info.sites, strict=True):
        limit = float(np.finfo(spec.dtype).max)
        for index, name in enumerate(found.names[site.name]):
            if _largest(found.tensors[name]) <= limit:
                continue
            for prompt, n in enumerate(harvest.tokens.lengths.tolist()):
                values = valid_values(found.tensors[name], site, prompt, n, padding=planned.padding)
                largest = _largest(values)
                if not np.isfinite(largest):
                    raise OverflowingError(f"{name} is not finite ({largest}) in prompt {prompt}; nothing is imported")
                if largest > limit:
                    raise range_error(site.name, site.layers[index] if site.layers else None, spec.dtype, largest)


def _largest(tensor: torch.Tensor) -> float:
    low, high = torch.aminmax(tensor)
    return max(-float(low), float(high)) if low == low else float("nan")


def _exact_store(found: FoundSites) -> str:
    """Return the dtype that holds every tensor exactly; raises `SettingError` where none does."""
    stores = set()
    for names in found.names.values():
        for name in names:
            dtype = found.tensors[name].dtype
            if dtype not in STORES:
                raise SettingError(f"{name} holds {dtype}; say --store float32 (or float16) to round it")
            stores.add(STORES[dtype])
    return max(stores, key=lambda store: ("float16", "float32").index(store))


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _no_call(ids: torch.Tensor, mask: torch.Tensor | None) -> Any:
    raise AssertionError("an import has no model to run")
