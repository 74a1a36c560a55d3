"""Which models a study is of: its own trainings, one asked for by the command line, files, or runs that are there."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import actdb
from analyses.common.program import Options, note
from analyses.modular_arithmetic.existing import harvest_published, read_published
from analyses.modular_arithmetic.model import ANSWER, MEMORIES
from analyses.modular_arithmetic.training import Trained, Training, finished, run_trainings, trainings_of

MAIN = Training(modulus=37, train_share=0.45, n_epochs=7000, every=250, d_model=64, d_mlp=256)
"""The default study: the specification's model (A) at a modulus, and of a size, that groks in minutes."""
SMALL: dict[str, Any] = {"modulus": 11, "train_share": 0.5, "n_epochs": 300, "every": 100, "d_model": 32, "d_mlp": 64}
CONTROL_EPOCHS = 2000
"""The control is the same without weight decay: it remembers its pairs and does not grok."""
OTHERS = (
    Training("pooled", modulus=17, train_share=1.0, n_epochs=1000, weight_decay=0.01, every=100),
    Training("lookup", modulus=17, train_share=0.7, n_epochs=1000, weight_decay=0.01, every=500),
    Training("hybrid", modulus=17, train_share=0.7, n_epochs=1000, weight_decay=0.01, every=500),
)
SPECIFIED = {
    "one-layer": Training(modulus=113, train_share=0.3, n_epochs=50_000, every=1000, stop_below=1e-5),
    "pooled": Training("pooled", modulus=17, train_share=1.0, n_epochs=1000, weight_decay=0.01, every=50),
    "lookup": Training("lookup", modulus=17, train_share=0.7, n_epochs=1000, weight_decay=0.01, every=100),
    "hybrid": Training("hybrid", modulus=17, train_share=0.7, n_epochs=1000, weight_decay=0.01, every=100),
}
"""What `--modulus` and `--architecture` train; other options change the share, the epochs and the checkpoints."""


@dataclass(frozen=True)
class Model:
    """A model of the study: its checkpoints' runs in the order of training, and its training where that is known.

    Keys of its claims begin with `key`; circuits and concepts are looked for where it `is_taken_apart`.
    """

    key: str
    name: str
    runs: tuple[str, ...]
    trained: Trained | None = None
    is_taken_apart: bool = True


def asked_training(options: Options) -> Training | None:
    """Return the one training that the command line asks for; None where it asks for none."""
    own = options.own
    if own.modulus is None and own.architecture is None:
        return None
    architecture = own.architecture or "one-layer"
    if architecture not in SPECIFIED:
        raise actdb.SettingError(f"--architecture {architecture}: choose one of {', '.join(SPECIFIED)}")
    training = replace(
        SPECIFIED[architecture], seed=options.seed, modulus=own.modulus or SPECIFIED[architecture].modulus
    )
    given = {
        "n_epochs": own.epochs,
        "train_share": own.train_share,
        "every": own.every,
        "weight_decay": own.weight_decay,
    }
    return replace(training, **{key: value for key, value in given.items() if value is not None})


def own_trainings(options: Options) -> list[Training]:
    """Return the trainings of the default study, the main one first, then its control."""
    main = replace(MAIN, seed=options.seed)
    others = [replace(training, seed=options.seed) for training in OTHERS]
    if options.small:
        main = replace(main, **SMALL)
        others = [replace(training, modulus=SMALL["modulus"], n_epochs=200) for training in others[:1]]
    control = replace(main, group="memorising", weight_decay=0.0, n_epochs=min(main.n_epochs, CONTROL_EPOCHS))
    return [main, control, *others]


def make_models(options: Options) -> list[Model]:
    """Return the models to study, the main one first: trained, read from files, or found in the database."""
    if options.model is not None:
        published = read_published(Path(options.model))
        note(f"harvesting {len(published.checkpoints)} checkpoints of {published.name} into {options.db}")
        return [Model("model", published.name, harvest_published(published, options.db, run=options.run))]
    if options.given_db:
        return stored_models(options.db, options.run)
    return trained_models(options)


def trained_models(options: Options) -> list[Model]:
    """Train what is asked for, or the default study's models; what the database has is not trained again."""
    asked = asked_training(options)
    trainings = own_trainings(options) if asked is None else [asked]
    found = run_trainings(trainings, options.db, states=options.out / "states")
    return [_model(item, "model" if asked else None) for item in found]


def finished_models(options: Options) -> list[Model]:
    """Return the models of a finished study, training nothing; raises `SettingError` naming one that is missing."""
    if options.model is not None or options.given_db:
        return stored_models(options.db, options.run)
    asked = asked_training(options)
    found = []
    for training in own_trainings(options) if asked is None else [asked]:
        item = finished(options.db, training)
        if item is None:
            raise actdb.SettingError(
                f"{options.db} has no finished training {training.name} of this many epochs; leave --verify out"
            )
        found.append(_model(item, "model" if asked else None))
    return found


def stored_models(path: Path, run: str | None) -> list[Model]:
    """Return the model that a run of a database belongs to (None: the newest run), with all its checkpoints.

    Raises `SiteError` where the run has no answers over the grid.
    """
    with actdb.open(path) as db:
        chosen = db.run(run)
        if ANSWER not in chosen:
            raise actdb.SiteError(
                f"run {chosen.name!r} has no site {ANSWER!r}; harvest its weights with --model FILE instead"
            )
        trained = next((item for item in trainings_of(db) if chosen.name in item.runs), None)
        if trained is not None:
            return [_model(trained, "model")]
        names = (chosen.name,) if chosen.step is None else tuple(other.name for other in db.checkpoints(chosen.name))
        return [Model("model", str(chosen.info.model["model"]), names)]


def _model(item: Trained, key: str | None) -> Model:
    """A trained model under its key: of the default study the group or the architecture, the main one `main`."""
    training = item.training
    own = training.group or ("main" if training.architecture == MAIN.architecture else training.architecture)
    is_taken_apart = training.architecture not in MEMORIES and (key is not None or not training.group)
    return Model(key or own, training.name, item.runs, item, is_taken_apart)
