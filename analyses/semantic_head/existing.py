"""A run that is there already: its heads ranked from stored patterns, and one head's weights taken apart."""

from collections.abc import Iterator

import numpy as np

import actdb
from analyses.common.program import Options, Study, note
from analyses.common.report import Claim
from analyses.semantic_head import claims as claiming
from analyses.semantic_head import picture
from analyses.semantic_head.category import TABLE, Categories, categories_of
from analyses.semantic_head.circuit import random_circuit, read_circuit
from analyses.semantic_head.score import rank_heads, store_scores, targets
from analyses.semantic_head.subject import FULL

N_DRAWN = 5


def run_existing(options: Options) -> Study:
    """Rank the heads of a stored run on its own prompts and, unless only that is asked for, split the best one's form.

    Runs no model. Raises `SiteError` where the run keeps no patterns, `SettingError` where its prompts hold too few
    words of the categories, or its weights are not folded as the eigenvalues need.
    """
    with actdb.open(options.db) as db:
        run = db.run(options.run)
        categories = read_categories(db, run)
        if not options.own.all_heads:
            check_folded(db, run)
        labels = categories.labels(int(run.info.model["d_vocab"]))
        note(f"{run.name}: scoring every head on its stored patterns")
        store_scores(options.db, run, categories, labels, seed=options.seed)
        db.refresh()
        ranked = rank_heads(db, run.name)
        title = f"Heads of {run.name} by semantic score"
        figures = {"figures/ranking.png": picture.draw_ranking(options.figures / "ranking.png", ranked, title=title)}
        n = len(ranked) if options.own.all_heads else 3
        entries = [_covered(run, labels, seed=options.seed)]
        entries += claiming.ranking_claims(ranked, seed=options.seed, n=n)
        if not options.own.all_heads:
            layer, head = options.own.layer, options.own.head
            if layer is None or head is None:
                best = max(ranked, key=lambda entry: entry.shuffled - entry.score)
                layer, head = best.layer, best.head
            entries += _split(run, layer, head, options, figures)
        return Study(run.name, [entry.judged() for entry in entries], figures=figures)


def read_categories(db: actdb.Database, run: actdb.Run) -> Categories:
    """Return the categories of a run: those that an earlier study of this database kept, else by its tokens' texts."""
    texts = {text: token for token, text in run.vocabulary().items()}
    if TABLE in db.snapshot.tables:
        rows = db.sql(f"SELECT category, token_id FROM {TABLE} ORDER BY category, token_id").fetchall()
        names = list(dict.fromkeys(name for name, _ in rows))
        tokens = {name: tuple(int(token) for other, token in rows if other == name) for name in names}
        return Categories("stored", tokens, None, {token: text for text, token in texts.items()})
    return categories_of(texts, bos=None, least=2)


def check_folded(db: actdb.Database, run: actdb.Run) -> None:
    """Raise `SettingError` where layer norms are not folded into the run's weights."""
    row = db.sql("SELECT fold_ln FROM runs WHERE run = $1", [run.name]).fetchone()
    if row is None or not row[0]:
        raise actdb.SettingError(
            f"run {run.name!r} has its layer norms beside the weights, and the eigenvalues need them folded in: "
            "harvest with --processing folded, or ask for --all-heads alone"
        )


def _covered(run: actdb.Run, labels: np.ndarray, *, seed: int) -> Claim:
    """The share of queries that have an earlier word of their category: the others should attend to the first token."""
    found = [targets(run.tokens(prompt).astype(np.int64), labels) for prompt in run.prompt_ids()]
    has = np.concatenate([target[:, 1:].any(1) for target in found])
    about = "share of queries with an earlier word of their category after the first token"
    return Claim("covered", float(has.mean()), n=len(has), seed=seed, verdict="measured", about=about)


def _split(run: actdb.Run, layer: int, head: int, options: Options, figures: dict[str, str]) -> Iterator[Claim]:
    circuit = read_circuit(run, layer=layer, head=head)
    controls = [random_circuit(circuit, seed=options.seed + i) for i in range(FULL.n_controls)]
    path, title = options.figures / "spectrum.png", f"L{layer}H{head} of {run.name}: eigenvalues"
    figures["figures/spectrum.png"] = picture.draw_spectrum(path, circuit, controls[:N_DRAWN], title=title)
    yield from claiming.spectrum_claims(circuit, controls, seed=options.seed)
