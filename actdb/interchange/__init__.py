"""Ways in and out for other tools: xarray, torch, TransformerLens, Parquet, npz, safetensors, Hugging Face datasets."""

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from actdb.run import Run


def import_activations(
    path: str | os.PathLike[str],
    prompts: str | os.PathLike[str] | Iterable[Mapping[str, Any]],
    out: str | os.PathLike[str],
    *,
    run: str | None = None,
    model: str | None = None,
    step: int | None = None,
    sites: str | Sequence[str] | None = None,
    layers: Sequence[int] | None = None,
    padding: str = "right",
    pad_to: int | None = None,
    causal: bool | None = None,
    store: str | None = None,
    codec: str = "lz4",
    precision: int | None = None,
    tokenizer: Any = None,
    bos: bool = True,
    part_tokens: int | None = None,
) -> "Run":
    """Store activations that were computed elsewhere as a run of the database `out`; returns the run.

    `path` is a .pt, .safetensors or .npz file of tensors by TransformerLens hook name, such as `cache.cache_dict` saved
    by `torch.save` (tensors only: nothing is unpickled). Shapes are [batch, pos, feature], [batch, pos, head, feature],
    patterns [batch, head, query, key], prompts in their order along the batch; a single one may lack the batch axis.
    `prompts` are as for `harvest`; their `tokens` (or text with a `tokenizer`) give the lengths, pads are dropped.
    `padding` is the side of the pads, `pad_to` the padded length where longer than the longest prompt.

    `sites` default to every known one in the file. Values are kept as they are (bfloat16 as float32) unless `store` or
    `precision` say otherwise. Layers, heads and widths of the model are read off names and shapes, `causal` off the
    patterns (true without any); weights and statistics there are none. The same call again resumes an interrupted
    import and repairs damaged parts. Memory: a part's blocks under way; a compressed npz is held whole.

    Raises `ActivationsError` for a file or a tensor that cannot be used, naming it, `SiteError`, `PromptError` and
    `SettingError` before anything is written, `RunError` where the run's name is taken by another plan,
    `OverflowingError` for values that are not finite or that `store` cannot hold, `SpaceError` for a disk too small.
    """
    from actdb.database import open_run
    from actdb.harvesting.settings import Settings, parse_sites
    from actdb.interchange.importing import plan_import, run_import

    settings = Settings(
        run=run,
        step=step,
        sites=parse_sites(sites),
        layers=None if layers is None else tuple(layers),
        store=store,
        codec=codec,
        precision=precision,
        tokenizer=tokenizer,
        bos=bos,
        part_tokens=part_tokens,
    )
    given = Path(prompts) if isinstance(prompts, os.PathLike) else prompts
    planned = plan_import(Path(path), given, settings, model=model, padding=padding, pad_to=pad_to, causal=causal)
    run_import(planned, Path(out))
    return open_run(out, planned.harvest.info.name)
