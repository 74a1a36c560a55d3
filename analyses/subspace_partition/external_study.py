"""The study of a folder of the decompiled-transformers format: accuracy by step and length, and what each head does."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import actdb
from analyses.common.program import Options, Study, note
from analyses.common.report import Claim
from analyses.subspace_partition import circuit_picture as picture
from analyses.subspace_partition import copy_claims as claiming
from analyses.subspace_partition.copy_study import Found
from analyses.subspace_partition.copying import exact_match
from analyses.subspace_partition.external import (
    External,
    HeadUse,
    accuracy_by_length,
    harvest_external,
    harvest_lengths,
    measure_heads,
    read_external,
)

SHORT = (1, 20)
"""Lengths of the lists by which the steps are compared."""
SHOWN_LENGTH = 12


@dataclass(frozen=True)
class ExternalExtent:
    """How many lists are harvested: for steps and heads, and over all lengths."""

    n_prompts: int = 300
    n_lengths: int = 900


def run_external(options: Options) -> Study:
    """Study the folder that `--external` names."""
    extent = ExternalExtent(60, 120) if options.small else ExternalExtent()
    folder, figures = options.own.external, options.figures
    found = study_external(folder, options.db, figures=figures, extent=extent, seed=options.seed)
    return Study(found.run, found.claims, text=found.text, figures=found.figures)


def study_external(folder: str | Path, db: Path, *, figures: Path, extent: ExternalExtent, seed: int) -> Found:
    """Harvest a folder and its steps, hold accuracies to those that it states, score heads and copying without each."""
    external = read_external(folder)
    note(f"{external.name}: harvesting {len(external.steps)} steps and the final weights")
    lengths = (SHORT[0], min(SHORT[1], external.longest))
    runs = harvest_external(external, db, n_prompts=extent.n_prompts, lengths=lengths, seed=seed)
    over = harvest_lengths(external, db, n_prompts=extent.n_lengths, seed=seed)
    note(f"{external.name}: heads, and copying without each")
    uses = measure_heads(actdb.load_model(external.folder), runs[-1], db)
    ranges = {(low, high): stated for (low, high), stated in external.claimed.items() if low <= external.longest}
    with actdb.open(db) as held:
        steps = {run.name: exact_match(held, run.name) for run in runs}
        found = accuracy_by_length(held, over.name, list(ranges))
    by_range = {bounds: (exact, ranges[bounds]) for bounds, exact in zip(ranges, found, strict=True)}
    claims = list(claiming.external_claims(external.name, steps, by_range, uses, seed=seed))
    captions = _draw(external, runs, uses, figures)
    return Found(runs[-1].name, claims, {f"External model: {external.name}": _text(uses, claims)}, captions)


def _draw(external: External, runs: Sequence[actdb.Run], uses: Sequence[HeadUse], figures: Path) -> dict[str, str]:
    """Draw all heads on one list of the final model."""
    run = runs[-1]
    prompt = min(range(run.n_prompts), key=lambda i: abs(len(run.tokens(i)) - (2 * SHOWN_LENGTH + 3)))
    name = f"{external.name}-patterns"
    title = f"{external.name}: attention on a list of {(len(run.tokens(prompt)) - 3) // 2}"
    texts = [external.text(token) for token in run.tokens(prompt).tolist()]
    path, scores = figures / f"{name}.png", [use.score for use in uses]
    caption = picture.draw_patterns(path, run, prompt, scores, title=title, tokens=texts)
    return {f"figures/{name}.png": f"{external.name}: {caption}"}


def _text(uses: Sequence[HeadUse], claims: Sequence[Claim]) -> str:
    lines = [
        "| head | previous token | induction | copied without it | what it is |",
        "| --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| {use.score.name} | {use.score.previous:.3f} | {use.score.induction:.3f} | {use.without.value:.3f} "
        f"| {use.verdict} |"
        for use in uses
    ]
    return "\n".join([*lines, "", f"Copied as it is: {uses[0].intact.value:.3f}, {len(claims)} figures in the table."])
