"""The selectivity of runs that are there already, or of a model that the user names: steps 1 to 3 on them."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

import actdb
from analyses.common.program import Options, Study, note
from analyses.common.report import Claim, claim
from analyses.common.significance import proportion_interval
from analyses.feature_persistence import picture
from analyses.feature_persistence.null import check_null
from analyses.feature_persistence.selection import KINDS, LEVEL, Selectivity, measure, token_cells
from analyses.feature_persistence.tracking import follow, is_persistent

N_NULL_NEURONS, N_NULL_REPETITIONS = 64, 10


def run_existing(options: Options) -> Study:
    """Measure the run that was asked for, and follow its neurons where its model has several steps."""
    if options.model is not None:
        note(f"harvesting mlp_post of {options.model} into {options.db}")
        sites = ("mlp_post",)
        actdb.harvest(options.model, str(options.prompts), out=options.db, run=options.run, sites=sites)
    with actdb.open(options.db) as db:
        run = db.run(options.run)
        found = measure(run)
        claims = [*_selectivity_claims(run, found, seed=options.seed)]
        figures: dict[str, str] = {}
        steps = [other.name for other in db.checkpoints(run.name) if "mlp_post" in other]
        if len(steps) > 1:
            claims += _follow(db, steps, options.figures, figures, seed=options.seed)
        return Study(run.name, [entry.judged() for entry in claims], figures=figures)


def _selectivity_claims(run: actdb.Run, found: Selectivity, *, seed: int) -> list[Claim]:
    cells = token_cells(run)
    lengths = [len(run.tokens(prompt)) for prompt in range(run.n_prompts)]
    null = check_null(
        cells, prompt_lengths=lengths, n_neurons=N_NULL_NEURONS, n_repetitions=N_NULL_REPETITIONS, seed=seed
    )
    claims = []
    for kind in KINDS:
        flags, variance = found.selective(kind), found.by_kind(kind)
        expected = null.mean_eta[kind]
        for i, layer in enumerate(run["mlp_post"].layers):
            share = proportion_interval(int(flags[i].sum()), flags.shape[1])
            about = f"share of the neurons of layer {layer} selective for {kind}, Bonferroni"
            claims.append(
                claim(f"L{layer}.{kind}.selective", share, seed=seed, null=LEVEL / flags.shape[1], about=about)
            )
            eta = variance.eta_squared[i]
            low, high = (float(q) for q in np.quantile(eta, (0.025, 0.975)))
            about = f"mean η² by {kind} over {found.n_rows} rows; interval: 95 % of the neurons; null: noise"
            claims.append(
                Claim(f"L{layer}.{kind}.eta_mean", float(eta.mean()), low, high, len(eta), seed, expected, about=about)
            )
    return claims


def _follow(
    db: actdb.Database, steps: Sequence[str], folder: Path, figures: dict[str, str], *, seed: int
) -> list[Claim]:
    history = follow(db, steps)
    figures["figures/selectivity.png"] = picture.draw_selectivity(
        folder / "selectivity.png", history, title=f"{db.run(steps[0]).info.model['model']} through training"
    )
    claims = []
    for kind in KINDS:
        top = history.of(kind, history.top(kind))
        kept = is_persistent(top[0], top[-1])
        about = f"top neurons by {kind} at step {history.steps[0]} that persist to step {history.steps[-1]}"
        share = proportion_interval(int(kept.sum()), kept.size)
        claims.append(claim(f"{kind}.persistence", share, seed=seed, about=about))
    return claims
