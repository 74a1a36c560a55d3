"""The whole study on models of its own: toy (a), the null, and the copy transformers with their circuits."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from analyses.common.program import Options, Study, note
from analyses.common.report import Claim
from analyses.subspace_partition import claims as claiming
from analyses.subspace_partition import picture
from analyses.subspace_partition.copy_extent import BIGRAM, UNIQUE, Extent
from analyses.subspace_partition.copy_patching import study_patching
from analyses.subspace_partition.copy_study import CopyStudy, Found
from analyses.subspace_partition.copying import train_copier
from analyses.subspace_partition.toy import FULL, SMALL, Null, Toy, study_nulls, study_orthogonal, study_toy
from analyses.subspace_partition.training import MERGE

PROGRAMME = "subspace_partition"
COPIES = (UNIQUE, BIGRAM)
"""The copy transformers that are studied."""


def run_study(options: Options) -> Study:
    """Train, partition, measure; see the steps in the folder's README."""
    return _Steps(options).all()


def copy_studies(options: Options) -> Iterator[Found]:
    """Study the copy transformers: training, partition, contents, circuit, and then patching of subspaces."""
    for extent in COPIES:
        chosen = _reduced(extent) if options.small else extent
        study = CopyStudy(chosen, db=options.db, figures=options.figures, seed=options.seed)
        yield study.all()
        # the trained model again: everything is done, so that nothing but its state is read
        trained = train_copier(study.copier, options.db, checkpoints=chosen.checkpoints, n_prompts=chosen.n_prompts)
        unit = chosen.recipe.unit
        yield study_patching(
            trained.model, study.name, options.db, figures=options.figures, unit=unit, seed=options.seed
        )


def _reduced(extent: Extent) -> Extent:
    """An extent for a first look: a tenth of the steps."""
    recipe, n_steps = extent.recipe, extent.copier.n_steps // 10
    return replace(
        extent,
        copier=replace(extent.copier, n_steps=n_steps),
        checkpoints=(0,),
        recipe=replace(
            recipe,
            first_merge=max(1, recipe.first_merge // 10),
            merge_every=max(1, recipe.merge_every // 10),
            n_steps=recipe.n_steps // 10,
            information_keys=1024,
            information_queries=256,
        ),
        n_row_prompts=min(extent.n_row_prompts, 1000),
        n_prompts=32,
        n_pairs=16,
        n_queries=16,
        n_null=50,
        n_starts=1,
    )


class _Steps:
    """The steps of one study on one database."""

    def __init__(self, options: Options) -> None:
        self.options, self.seed = options, options.seed
        self.extent = SMALL if options.small else FULL
        self.state = options.out / "state"
        self.figures: dict[str, str] = {}
        self.text: dict[str, str] = {}

    def all(self) -> Study:
        """Run every step; the claims belong to the first seed's toy."""
        toys = self._toys()
        found = [*self._judge_toys(toys), *self._judge_orthogonal(), *self._judge_nulls()]
        for part in copy_studies(self.options):
            found += part.claims
            self.text |= part.text
            self.figures |= part.figures
        return Study(toys[0].run, [entry.judged() for entry in found], text=self.text, figures=self.figures)

    def _toys(self) -> list[Toy]:
        toys = []
        for i in range(self.extent.n_seeds):
            note(f"toy (a), seed {self.seed + i}: model, rows, partition")
            toys.append(study_toy(self.options.db, self.extent, seed=self.seed + i, state=self.state))
        return toys

    def _judge_toys(self, toys: Sequence[Toy]) -> list[Claim]:
        self._figure("toy_a", picture.draw_toy(self._path("toy_a"), toys[0]))
        self._figure("recovery", picture.draw_recovery(self._path("recovery"), toys))
        trainings = {f"seed {toy.seed}": toy.trained for toy in toys[:3]}
        self._figure("training", picture.draw_training(self._path("training"), trainings))
        title = f"Toy (a), seed {toys[0].seed}: what pairs of subspaces tell of one another"
        self._figure("merging", picture.draw_merging(self._path("merging"), toys[0].trained, title=title))
        self._figure("baselines", picture.draw_baselines(self._path("baselines"), toys))
        self.text["Toy (a): are the two groups found?"] = _toy_text(toys)
        return [*claiming.toy_claims(toys, seed=self.seed), *claiming.toy_baseline_claims(toys, seed=self.seed)]

    def _judge_orthogonal(self) -> list[Claim]:
        note("toy (a) with orthogonal groups, built by hand")
        toy = study_orthogonal(self.options.db, self.extent, seed=self.seed, state=self.state)
        return list(claiming.orthogonal_claims(toy, seed=self.seed))

    def _judge_nulls(self) -> list[Claim]:
        note("the null: isotropic noise")
        nulls = study_nulls(self.options.db, self.extent, seed=self.seed, state=self.state)
        self.text["The null: what a training makes of noise"] = _null_text(nulls)
        return list(claiming.null_claims(nulls, seed=self.seed))

    def _path(self, name: str) -> Path:
        return self.options.figures / f"{name}.png"

    def _figure(self, name: str, caption: str) -> None:
        self.figures[f"figures/{name}.png"] = caption


def _toy_text(toys: Sequence[Toy]) -> str:
    lines = [
        "| seed | subspaces | overlap, group 0 | group 1 | steps | merges |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for toy in toys:
        sizes = "+".join(map(str, toy.trained.partition.sizes))
        overlap = " | ".join(f"{value:.3f}" for value in toy.recovery.overlap)
        merged = "; ".join(
            f"{event.highest:.2f} at {event.step}" for event in toy.trained.events if event.kind == MERGE
        )
        lines.append(f"| {toy.seed} | {sizes} | {overlap} | {len(toy.trained.losses)} | {merged} |")
    return "\n".join([*lines, "", "Merges: the highest normalised information before each, at its step."])


def _null_text(nulls: Sequence[Null]) -> str:
    lines = ["| run | subspaces | distance | random rotation | overlap with another seed | chance |"]
    lines.append("| --- | --- | --- | --- | --- | --- |")
    for null in nulls:
        sizes = "+".join(map(str, null.trained.partition.sizes))
        distances = f"{null.trained_distance:.4f} | {null.random_distance:.4f}"
        lines.append(f"| {null.run} | {sizes} | {distances} | {null.agreement:.3f} | {null.chance:.3f} |")
    return "\n".join(lines)
