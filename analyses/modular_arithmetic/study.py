"""The whole study: models, the steps of the specification on each, claims and figures."""

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import actdb
from analyses.common.program import Options, Study, note
from analyses.modular_arithmetic import picture
from analyses.modular_arithmetic import progress as measuring
from analyses.modular_arithmetic.circuit_study import study_circuit
from analyses.modular_arithmetic.claims import CLAIMED_ABLATION, STORED_ABLATION
from analyses.modular_arithmetic.comparison_study import study_comparison
from analyses.modular_arithmetic.concept_study import study_concepts
from analyses.modular_arithmetic.core import Core
from analyses.modular_arithmetic.finding import Findings, join
from analyses.modular_arithmetic.graph import Subject, history_of
from analyses.modular_arithmetic.grid import Grid
from analyses.modular_arithmetic.model import restore
from analyses.modular_arithmetic.plan import Model, asked_training, finished_models, make_models
from analyses.modular_arithmetic.progress import Measures
from analyses.modular_arithmetic.summary import describe
from analyses.modular_arithmetic.topology_study import study_topology
from analyses.modular_arithmetic.verification import compare, report, stored_claims

PROGRAMME = "modular_arithmetic"
TWO_LAYERS = "pooled"


def run_study(options: Options) -> Study:
    """Train or read the models, and do every step; see the folder's README."""
    models = make_models(options)
    with actdb.open(options.db) as db:
        steps = _Steps(options, db, models, options.out)
        found = steps.all()
    with actdb.open(options.db, mode="a") as db:
        db.add_table(measuring.TABLE, measuring.table(steps.measures), replace=True)
    return Study(models[0].runs[-1], found.claims, found.sections, found.figures)


def verify(options: Options) -> tuple[str, bool]:
    """Step 10: compute every claim of a finished study again; returns the table, and whether all pass."""
    models = finished_models(options)
    stored = stored_claims(options.db, PROGRAMME, models[0].runs[-1])
    with tempfile.TemporaryDirectory() as folder, actdb.open(options.db) as db:
        again = _Steps(options, db, models, Path(folder)).all().claims
    checks = compare(stored, again)
    return report(checks), all(check.passed for check in checks)


class _Steps:
    """The steps of one study over the models of one database, which they only read; figures go to `folder`."""

    def __init__(self, options: Options, db: actdb.Database, models: Sequence[Model], folder: Path) -> None:
        self.options, self.db, self.models, self.folder = options, db, models, folder
        self.seed = options.seed
        self.cores = {model.key: self._core(model) for model in models}

    @property
    def measures(self) -> list[Measures]:
        """The progress measures of every checkpoint of every model."""
        return [entry for core in self.cores.values() for entry in core.measures]

    def all(self) -> Findings:
        """Do every step; claims are judged, and what they say put into words first."""
        parts = [self._follow(), self._intervene(), self._take_apart(), self._lay_out()]
        if self._is_default:
            parts.append(
                study_comparison(self.options.db, folder=self.folder, seed=self.seed, small=self.options.small)
            )
        found = join(parts)
        claims = [entry.judged() for entry in found.claims]
        return Findings(claims, {**describe(claims), **found.sections}, found.figures)

    @property
    def _is_default(self) -> bool:
        return not self.options.foreign and asked_training(self.options) is None

    def _core(self, model: Model) -> Core:
        is_original = model.trained is not None and model.trained.training.architecture == TWO_LAYERS
        stated = (CLAIMED_ABLATION, STORED_ABLATION) if is_original else ({}, {})
        return Core(self.db, model.name, model.runs, self.folder, self.seed, model.trained, model.key, *stated)

    def _follow(self) -> Findings:
        """Steps 1 and 2 on every model, and on the main one before training."""
        parts = []
        spectra = {}
        for key, core in self.cores.items():
            note(f"{key}: Fourier spectrum and progress measures of {len(core.runs)} checkpoints")
            parts += [core.frequencies(), core.progress()]
            spectra[key] = core.spectrum
        main = self.models[0]
        if len(main.runs) > 1:
            untrained = self._core(replace(main, key="untrained", runs=main.runs[:1], trained=None))
            parts += [untrained.frequencies(), untrained.progress()]
            spectra["untrained"] = untrained.spectrum
        path = self.folder / "figures" / "spectra.png"
        caption = picture.draw_spectra(path, spectra, title="Fourier power of the embedding")
        return join([Findings((), figures={"figures/spectra.png": caption}), *parts])

    def _intervene(self) -> Findings:
        """Step 3 on the models that compute: the main one and the two-layer one."""
        parts = []
        for model in self._taken_apart:
            note(f"{model.key}: ablation and patching of every component")
            parts.append(self.cores[model.key].intervene())
        return join(parts)

    def _take_apart(self) -> Findings:
        """Steps 4 to 7 on the same, in the small study on the main one alone."""
        parts = []
        folder = self.folder / "figures"
        for model in self._taken_apart[: 1 if self.options.small else None]:
            grid, first = self.cores[model.key].grid, self._initial(model)
            parts.append(study_circuit(grid, folder=folder, seed=self.seed, name=model.key))
            parts.append(
                study_concepts(
                    grid, control=first, folder=folder, seed=self.seed, name=model.key, small=self.options.small
                )
            )
        return join(parts)

    def _lay_out(self) -> Findings:
        """Step 8: the concept graphs of all models, side by side."""
        subjects = [
            Subject(model.key, model.runs, core.modulus, history_of(core.measures))
            for model, core in zip(self.models, self.cores.values(), strict=True)
        ]
        return study_topology(self.db, subjects, folder=self.folder, seed=self.seed, small=self.options.small)

    @property
    def _taken_apart(self) -> list[Model]:
        return [model for model in self.models if model.is_taken_apart]

    def _initial(self, model: Model) -> Grid | None:
        """The model before training, the control of the probes."""
        if len(model.runs) < 2:
            return None
        run = self.db.run(model.runs[0])
        return Grid(restore(run), run, self.cores[model.key].modulus)
