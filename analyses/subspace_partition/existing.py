"""A run or a model of the user's: a partition of one site and layer is trained, held against baselines, and stored."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import actdb
from analyses.common.program import Options, Study, note
from analyses.subspace_partition import claims as claiming
from analyses.subspace_partition import picture
from analyses.subspace_partition.baseline import TRAINED, baselines
from analyses.subspace_partition.buffer import Buffer, fill_buffer
from analyses.subspace_partition.corpus import CONTEXT, indirect_object_prompts, pack_documents
from analyses.subspace_partition.evaluation import (
    Effects,
    find_pairs,
    measure_geometry,
    patch_subspaces,
)
from analyses.subspace_partition.partition import Partition, store_partition
from analyses.subspace_partition.training import Recipe, Trained, train_partition

SMALL_STEPS = 300
N_PAIRS, N_SMALL_PAIRS = 100, 10
GPT2_NAMES = ("gpt2", "gpt2-small")
DEFAULT_SITE, DEFAULT_NAME = "resid_post", "trained"
UNITS = 24
"""Subspaces to begin with where no unit is given, if the width allows."""


@dataclass(frozen=True)
class Place:
    """Where to train: a run's site and layer, and the model to patch, where one is at hand."""

    run: actdb.Run
    site: str
    layer: int
    model: Any = None


def run_existing(options: Options) -> Study:
    """Train on a run that is there, or on a model's residual stream; see the options of `__main__`."""
    model = None
    if options.model is not None:
        note(f"loading {options.model}")
        model = actdb.load_model(str(options.model))
        run = _harvest(model, options)
    with actdb.open(options.db) as db:
        place = _place(db, run.name if model is not None else options.run, options, model)
    recipe = _recipe(place, options)
    buffer = fill_buffer(place.run[place.site].sel(layer=place.layer), seed=options.seed)
    note(f"training on {len(buffer.rows):,} rows of {place.site} {place.layer} for {recipe.n_steps:,} steps")
    state = options.out / "state" / f"{place.run.name}-{place.site}-{place.layer}-{options.own.name}"
    trained = train_partition(buffer, recipe, seed=options.seed, state=state, device=options.own.device)
    return _report(options, place, recipe, buffer, trained)


def _report(options: Options, place: Place, recipe: Recipe, buffer: Buffer, trained: Trained) -> Study:
    """Store the partition, measure it beside the baselines, patch where there are pairs."""
    name, seed = options.own.name, options.seed
    with actdb.open(options.db, mode="a") as db:
        about = {"site": place.site, "layer": place.layer, "steps": len(trained.losses), "seed": seed}
        store_partition(db, place.run, name, trained.partition, **about)
    rows = buffer.rows[: recipe.information_keys].float().cpu().numpy()
    partitions = {
        TRAINED: trained.partition,
        **baselines(rows, trained.partition.sizes, unit=recipe.unit, seed=seed),
    }
    counts: dict[str, Any] = {"n_queries": recipe.information_queries, "n_keys": recipe.information_keys, "seed": seed}
    note("measuring the partition and its baselines")
    geometry = {key: measure_geometry(buffer, each, **counts) for key, each in partitions.items()}
    claims = [*claiming.geometry_claims(geometry, seed=seed), *claiming.event_claims(trained, seed=seed)]
    folder = options.figures
    figures = {
        "figures/training.png": picture.draw_training(folder / "training.png", {place.run.name: trained}),
        "figures/information.png": picture.draw_information(folder / "information.png", geometry),
    }
    effects = _patch(options, place, partitions)
    if effects:
        claimed = claiming.GINI_CLAIMED if Path(str(options.model)).name in GPT2_NAMES else None
        claims += claiming.patching_claims(effects, geometry, seed=seed, claimed=claimed)
        figures["figures/effects.png"] = picture.draw_effects(folder / "effects.png", effects, geometry)
    return Study(
        place.run.name, [entry.judged() for entry in claims], text=_text(options, place, trained), figures=figures
    )


def _patch(options: Options, place: Place, partitions: Mapping[str, Partition]) -> dict[str, Effects]:
    """Patch every partition's subspaces between the pairs of prompts, if there are a model and pairs."""
    if place.model is None:
        note("no subspace is patched: give the model with --model to patch")
        return {}
    try:
        prompts = _pair_prompts(place.model, options)
    except actdb.SettingError as exc:
        note(f"no subspace is patched: {exc}")
        return {}
    name = f"{place.run.name}-pairs"
    actdb.harvest(
        place.model, prompts, out=options.db, run=name, sites=(place.site,), layers=[place.layer], store="float32"
    )
    with actdb.open(options.db) as db:
        run = db.run(name)
        pairs = find_pairs(db, run)
        return {
            key: patch_subspaces(place.model, run, each, pairs, site=place.site, layer=place.layer)
            for key, each in partitions.items()
        }


def _pair_prompts(model: Any, options: Options) -> list[dict[str, Any]]:
    """The user's pairs, or prompts of indirect object identification for a model with a tokenizer."""
    if options.own.pairs is not None:
        return [json.loads(line) for line in options.own.pairs.read_text(encoding="utf-8").splitlines() if line.strip()]
    tokenizer = getattr(model, "tokenizer", None)
    if tokenizer is None:
        raise actdb.SettingError("the model has no tokenizer; give pairs of prompts with --pairs")
    start = [] if tokenizer.bos_token_id is None else [int(tokenizer.bos_token_id)]
    n_pairs = N_SMALL_PAIRS if options.small else N_PAIRS
    encode = partial(tokenizer.encode, add_special_tokens=False)
    return indirect_object_prompts(encode, n_pairs, start=start, seed=options.seed)


def _harvest(model: Any, options: Options) -> actdb.Run:
    """Harvest one layer of a model over documents packed to full contexts; prompts of tokens are taken as they are."""
    if options.prompts is None:
        raise actdb.SettingError("--model needs --prompts: documents to harvest it on")
    layer = _layer(tuple(range(int(model.cfg.n_layers))), options.own.layer)
    name = options.run or f"{Path(str(options.model)).name}-packed"
    prompts = list(_packed(model, options.prompts))
    site = options.own.site
    note(f"harvesting {site} {layer} on {len(prompts):,} prompts")
    return actdb.harvest(model, prompts, out=options.db, run=name, sites=(site,), layers=[layer], stats=())


def _packed(model: Any, path: Path) -> Iterator[dict[str, list[int]]]:
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if lines and "tokens" in lines[0]:
        yield from ({"tokens": line["tokens"]} for line in lines)
        return
    tokenizer = getattr(model, "tokenizer", None)
    if tokenizer is None or tokenizer.eos_token_id is None:
        raise actdb.SettingError(f"{path} holds text, and the model has no tokenizer with an end token; give tokens")
    documents = (tokenizer.encode(line["text"], add_special_tokens=False) for line in lines)
    context = min(CONTEXT, int(model.cfg.n_ctx))
    yield from pack_documents(documents, end=int(tokenizer.eos_token_id), context=context)


def _place(db: actdb.Database, name: str | None, options: Options, model: Any) -> Place:
    run = db.run(name)
    site = options.own.site
    return Place(run, site, _layer(run[site].layers, options.own.layer), model)


def _layer(layers: tuple[int, ...], given: int | None) -> int:
    if given is None:
        return layers[len(layers) // 3]
    if given not in layers:
        raise actdb.SettingError(f"--layer {given}: choose one of {', '.join(map(str, layers))}")
    return given


def _recipe(place: Place, options: Options) -> Recipe:
    """The method's own recipe, its steps in proportion where fewer are asked for, its samples as far as rows reach."""
    own, recipe = options.own, Recipe()
    n_steps = own.steps or (SMALL_STEPS if options.small else recipe.n_steps)
    width, n_rows = place.run[place.site].shape[-1], place.run[place.site].sel(layer=place.layer).n_rows
    share = n_steps / recipe.n_steps
    return replace(
        recipe,
        unit=own.unit or _unit(width),
        n_steps=n_steps,
        first_merge=max(1, round(recipe.first_merge * share)),
        merge_every=max(1, round(recipe.merge_every * share)),
        learning_rate=own.rate or recipe.learning_rate,
        threshold=recipe.threshold if own.threshold is None else own.threshold,
        stop_at_n_subspaces=own.stop_at,
        information_keys=min(recipe.information_keys, n_rows * 3 // 4),
        information_queries=min(recipe.information_queries, n_rows // 4),
    )


def _unit(width: int) -> int:
    """The unit that makes `UNITS` subspaces or fewer: 32 for a width of 768."""
    return next(unit for unit in range(max(1, width // UNITS), width + 1) if width % unit == 0)


def _text(options: Options, place: Place, trained: Trained) -> dict[str, str]:
    sizes = ", ".join(map(str, trained.partition.sizes))
    name = options.own.name
    return {
        "The partition": (
            f"{place.site} of layer {place.layer} of run {place.run.name}: {trained.partition.n_subspaces} subspaces "
            f"of {sizes} dimensions after {len(trained.losses):,} steps, stored as {name}.\n\n```console\n"
            f"$ actdb nearest {options.db} {place.site} --layer {place.layer} --run {place.run.name} --prompt 0 "
            f"--pos -1 --partition {name} --subspace 0\n"
            f"$ actdb sql {options.db} \"SELECT subspace, first, size FROM partitions WHERE partition = '{name}'\"\n```"
        )
    }
