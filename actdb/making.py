"""What fills databases, as users call it: harvests, and the models that they run."""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from actdb.database import open_run
from actdb.harvesting.settings import Settings, parse_sites
from actdb.run import Run


def save_model(module: Any, folder: str | os.PathLike[str]) -> None:
    """Write a TransformerLens-native model as `config.json` and `model.safetensors`, for `actdb harvest FOLDER`.

    Raises `ModelError` for modules of another kind: those have a `save_pretrained` of their own.
    """
    from actdb.harvesting import native

    native.save_model(module, folder)


def load_model(
    source: str | os.PathLike[str],
    *,
    tokenizer: Any = None,
    dtype: str = "float32",
    device: str | None = None,
    random_init: int | None = None,
    processing: str = "raw",
) -> Any:
    """Load a model by name or from a folder, as a harvest does, for interventions and for several harvests.

    Returns a module with TransformerLens HookPoints that `harvest` and `hooked` take; its `tokenizer` is the one found
    or given, None where there is none. The keywords are those of `harvest`. Raises `ModelError` and `SettingError` as
    `harvest` does.
    """
    from actdb.harvesting import models

    loaded = models.load_model(
        source, tokenizer=tokenizer, dtype=dtype, device=device, random_init=random_init, processing=processing
    )
    module: Any = loaded.module
    module.tokenizer = loaded.tokenizer
    return module


def hooked(model: Any, hooks: Sequence[tuple[str, Callable[..., Any]]]) -> AbstractContextManager[None]:
    """Keep interventions on a model while the context is open: `with actdb.hooked(model, hooks): model(ids)`.

    `model` and the (hook_name, function) pairs are those that `harvest` takes; a function gets the activation and the
    hook point, and returns what replaces it (None: nothing does). They run in the order given, with dropout out, and
    are gone afterwards. Raises `SettingError` for a hook that the model does not have.
    """
    from actdb.harvesting import intervention

    return intervention.hooked(model, hooks)


def harvest(
    model: Any,
    prompts: str | os.PathLike[str] | Iterable[Mapping[str, Any]],
    out: str | os.PathLike[str] | None = None,
    *,
    run: str | None = None,
    step: int | None = None,
    sites: str | Sequence[str] | None = None,
    layers: Sequence[int] | None = None,
    positions: str = "all",
    dtype: str | None = None,
    store: str | None = None,
    codec: str = "lz4",
    precision: int | None = None,
    pattern: str = "full",
    stats: Sequence[str] | None = None,
    bos: bool = True,
    max_length: int | None = None,
    strict: bool = False,
    batch_tokens: int | None = None,
    part_tokens: int | None = None,
    buffer_mb: int = 128,
    worker: tuple[int, int] | None = None,
    device: str | None = None,
    tokenizer: Any = None,
    processing: str = "raw",
    random_init: int | None = None,
    hooks: Sequence[tuple[str, Callable[..., Any]]] = (),
    hooks_id: str | None = None,
    progress: Callable[[Any], None] | None = None,
) -> Run:
    """Run a model over prompts once and store its activations; returns the run.

    `model` is a name, a folder, or an `nn.Module` with TransformerLens HookPoints and a `cfg`; `prompts` is a .jsonl,
    .txt, .csv or .parquet file, or dicts with "text" or "tokens" and labels. `out` defaults to the model's short name
    with `.actdb`. Calling again with the same arguments resumes an interrupted run, checks a complete one against its
    checksums and recomputes damaged parts.

    `sites` are names of activations (default: those of resid_post, z, pattern, mlp_post that the model has; "none" for
    statistics only), `layers` the layers to store, `positions` "all" or "last". The model computes in `dtype` and
    values are kept as `store` (default float16, float32 for bfloat16 models), with `precision` mantissa bits where
    given. `hooks` are (hook_name, function) interventions, named by `hooks_id`. `worker=(i, n)` takes every n-th part.
    `progress` is called after each batch. Every other keyword is an option of `actdb harvest`, described there.

    Raises `ModelError`, `PromptError`, `SiteError`, `SettingError` before anything is written, `RunError` where the
    run's name is taken by another plan, `OverflowingError` where `store` cannot hold a value, `SpaceError` for a disk
    too small.
    """
    settings = Settings(
        run=run,
        step=step,
        sites=parse_sites(sites),
        layers=None if layers is None else tuple(layers),
        positions=positions,
        dtype=dtype,
        store=store,
        codec=codec,
        precision=precision,
        pattern=pattern,
        stats=None if stats is None else tuple(stats),
        bos=bos,
        max_length=max_length,
        strict=strict,
        batch_tokens=batch_tokens,
        part_tokens=part_tokens,
        buffer_mb=buffer_mb,
        worker=worker,
        device=device,
        tokenizer=tokenizer,
        processing=processing,
        random_init=random_init,
        hooks_id=hooks_id,
    )
    from actdb.harvesting.execution import run_harvest
    from actdb.harvesting.harvest import plan_harvest

    planned = plan_harvest(
        model, prompts if not isinstance(prompts, os.PathLike) else Path(prompts), settings, hooks=hooks
    )
    path = Path(out) if out is not None else Path(f"{planned.model.name}.actdb")
    run_harvest(planned, path, progress=progress)
    return open_run(path, planned.info.name)
