"""The activations of a new text: the run's model, loaded again, run through the code path of a harvest."""

from typing import Any

import numpy as np
import numpy.typing as npt

from actdb.errors import ModelError, SelectionError, SettingError
from actdb.neighbors.row import Plane
from actdb.storage import codecs

Floats = npt.NDArray[np.float32]


def text_rows(plane: Plane, text: str, *, model: Any = None, tokenizer: Any = None) -> Floats:
    """Return the rows [pos, width] of one layer (and head) for a text, rounded as the store rounds, as float32.

    `model` is what `harvest` takes; default: the name recorded with the run. Costs loading the model and a forward
    pass. Raises `ModelError` where it cannot be loaded or has other weights than the run's, `SettingError` for runs
    harvested under interventions, `PromptError` for a text that cannot be tokenised.
    """
    loaded = _load(plane, model, tokenizer)
    from actdb.harvesting.capture import pad_batch, run_batch, site_hooks
    from actdb.harvesting.prompts import check_prompts, tokenise
    from actdb.harvesting.sites import probe

    info, spec = plane.run.info, plane.source.spec
    limits = [n for n in (info.plan.get("max_length"), loaded.config["n_ctx"]) if n is not None]
    tokens = tokenise(
        check_prompts([("the query", {"text": text})], "text"),
        tokenizer=loaded.tokenizer,
        bos=bool(info.plan.get("bos")),
        limit=min(limits, default=None),
        d_vocab=loaded.config["d_vocab"],
        strict=True,
    )
    found = probe(loaded, (plane.site,), layers=None if plane.layer is None else (plane.layer,))
    positions = str(info.plan.get("positions"))
    batch = pad_batch(
        [tokens.prompt(0)],
        device=loaded.device,
        masked=loaded.takes_mask,
        causal=info.causal,
        positions=positions,
        packed=False,
    )
    blocks: list[Any] = []
    hooks = site_hooks(found.sites, batch, {plane.site: spec.dtype}, lambda site, index, block: blocks.append(block))
    run_batch(loaded, batch, hooks, unembed=found.needs_unembed)
    values = blocks[0].cpu().numpy()
    if spec.precision is not None:
        values, _ = codecs.round_mantissas(values, spec.precision)
    return np.asarray(values if plane.head is None else values[plane.head], np.float32)


def _load(plane: Plane, source: Any, tokenizer: Any) -> Any:
    """Load the run's model, and check that it is the one harvested."""
    info = plane.run.info
    if info.plan.get("hooks_id") is not None:
        raise SettingError(f"run {info.name!r} was harvested under interventions: query it by prompt or vector")
    if info.plan.get("weights_sha256") is None:
        raise SelectionError(f"run {info.name!r} was imported: its model is not known; query it by prompt or vector")
    from actdb.harvesting.models import load_model, weights_sha256

    name = str(info.model["model"])
    is_module = source is not None and hasattr(source, "forward")
    try:
        loaded = load_model(
            name if source is None else source,
            tokenizer=tokenizer,
            dtype=str(info.plan["dtype"]),
            random_init=None if is_module else info.plan.get("random_seed"),
            processing=str(info.plan.get("processing", "raw")),
        )
    except ModelError as exc:
        if source is not None:
            raise
        reason = str(exc).partition(";")[0]
        raise ModelError(
            f"a text query runs the run's model, and {name!r} cannot be loaded ({reason}): give its folder as model="
            " (--model)"
        ) from exc
    if weights_sha256(loaded) != info.plan["weights_sha256"]:
        raise ModelError(f"model {loaded.name} has other weights than those that run {info.name!r} was harvested from")
    return loaded
