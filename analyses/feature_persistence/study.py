"""The whole study: trainings, harvests, and the eight steps of the specification."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

import actdb
from analyses.common.program import Options, Study, note
from analyses.common.report import Claim
from analyses.feature_persistence import claims as claiming
from analyses.feature_persistence import experiment, picture
from analyses.feature_persistence.attention import describe_attention
from analyses.feature_persistence.correlation import correlate, importance, relate_importance, share_by_group
from analyses.feature_persistence.model import N_VOCABULARY, SCHEMES
from analyses.feature_persistence.null import NullCheck, check_null
from analyses.feature_persistence.random_network import harvest_random
from analyses.feature_persistence.selection import KINDS, measure, token_cells
from analyses.feature_persistence.source import find_sources, gaussian_cosines
from analyses.feature_persistence.task import PATTERNS
from analyses.feature_persistence.toolkit import apply_toolkit, harvest_structured, head_roles
from analyses.feature_persistence.tracking import History, follow
from analyses.feature_persistence.training import Trained, Training, losses_by_group, run_trainings

PROGRAMME = "feature_persistence"
MAIN = "default"
ETA_TABLE = "neuron_selectivity"


@dataclass(frozen=True)
class Extent:
    """How much is done: seeds of the main comparison, of each variant, and repetitions of the null."""

    n_seeds: int
    n_variant_seeds: int
    n_repetitions: int
    n_ablated: int


FULL = Extent(n_seeds=12, n_variant_seeds=5, n_repetitions=1000, n_ablated=5)
SMALL = Extent(n_seeds=3, n_variant_seeds=2, n_repetitions=40, n_ablated=1)


def run_study(options: Options) -> Study:
    """Train, harvest, measure; see the steps in the folder's README."""
    extent = SMALL if options.small else FULL
    trainings = plan_trainings(extent, seed=options.seed)
    trained = run_trainings(trainings, options.db)
    with actdb.open(options.db) as db:
        return _Steps(options, extent, trained, db).all()


def plan_trainings(extent: Extent, *, seed: int) -> list[Training]:
    """Return the main trainings, with all sites, and the variants, each of which changes one thing."""
    seeds = range(seed, seed + extent.n_seeds)
    main = [Training(MAIN, seed=s, all_sites=True) for s in seeds]
    variants: dict[str, dict[str, object]] = {scheme: {"scheme": scheme} for scheme in SCHEMES[1:]}
    variants |= {f"rate-{rate}": {"learning_rate": rate} for rate in (3e-4, 3e-3)}
    variants |= {"40-epochs": {"n_epochs": 40}, "causal": {"causal": True}}
    variants |= {f"{pattern}-only": {"patterns": (pattern,)} for pattern in PATTERNS}
    others = [
        Training(group, seed=s, every_checkpoint=False, **changes)  # type: ignore[arg-type]
        for group, changes in variants.items()
        for s in seeds[: extent.n_variant_seeds]
    ]
    return [*main, *others]


class _Steps:
    """The steps of one study on one database; each returns its claims."""

    def __init__(self, options: Options, extent: Extent, trained: Sequence[Trained], db: actdb.Database) -> None:
        self.options, self.extent, self.db = options, extent, db
        self.seed = options.seed
        self.trained = trained
        self.main = [item for item in trained if item.training.group == MAIN]
        self.figures: dict[str, str] = {}
        self.roles: dict[str, dict[tuple[int, int], str]] = {}

    def all(self) -> Study:
        """Run every step; the claims belong to the last checkpoint of the main training."""
        note("following every neuron through the checkpoints")
        histories = self._follow()
        main = histories[MAIN]
        null = self._null()
        claims = [*self._initial(null), *claiming.null_claims(null)]
        claims += claiming.tracking_claims(self.main[0], main[0], main)
        seeds = claiming.seed_claims(main, seed=self.seed)
        claims += [*seeds, *self._correlations(histories), *self._sources()]
        self._store(histories)
        note("the five experiments on random networks, and the toolkit")
        claims += [*self._experiments(), *self._toolkit()]
        self._draw(main, seeds)
        judged = [claim.judged() for claim in claims]
        return Study(self.main[0].training.runs[-1], judged, text=_sections(judged, self.roles), figures=self.figures)

    def _follow(self) -> dict[str, list[History]]:
        found: dict[str, list[History]] = {}
        for item in self.trained:
            found.setdefault(item.training.group, []).append(follow(self.db, item.training.runs))
        return found

    def _store(self, histories: dict[str, list[History]]) -> None:
        """Keep η² of every neuron at every checkpoint as a table, for SQL."""
        tables = [history.table() for found in histories.values() for history in found]
        with actdb.open(self.options.db, mode="a") as db:
            db.add_table(ETA_TABLE, pa.concat_tables(tables), replace=True)

    def _null(self) -> NullCheck:
        run = self.db.run(self.main[0].training.runs[0])
        lengths = [len(run.tokens(prompt)) for prompt in range(run.n_prompts)]
        n_neurons = int(run.info.model["d_mlp"])
        return check_null(
            token_cells(run),
            prompt_lengths=lengths,
            n_neurons=n_neurons,
            n_repetitions=self.extent.n_repetitions,
            seed=self.seed,
        )

    def _initial(self, null: NullCheck) -> list[Claim]:
        initial = [self.db.run(item.training.runs[0]) for item in self.main]
        found = [measure(run) for run in initial]
        final = [measure(self.db.run(item.training.runs[-1])) for item in self.main]
        noise = null.expected_eta[KINDS[0]]
        self._figure("effect_sizes", picture.draw_effect_sizes(self._path("effect_sizes"), found, final, noise))
        others = {site: [measure(run, site) for run in initial] for site in ("mlp_out", "resid_mid", "resid_post")}
        return [
            *claiming.initial_claims(found, null),
            *claiming.site_claims(others),
            *claiming.attention_claims([describe_attention(run) for run in initial]),
        ]

    def _correlations(self, histories: dict[str, list[History]]) -> list[Claim]:
        main = histories[MAIN]
        n_layers = main[0].eta[KINDS[0]].shape[1]
        correlations = {
            (layer, kind): correlate(main, kind, layer=layer, seed=self.seed)
            for layer in range(n_layers)
            for kind in KINDS
        }
        shares = share_by_group(histories, seed=self.seed)
        ablated = self.main[: self.extent.n_ablated]
        importances = [importance(self.db.run(t.training.runs[-1]), seed=t.training.seed) for t in ablated]
        related = {kind: relate_importance(main[: len(ablated)], importances, kind) for kind in KINDS}
        self._figure("variants", picture.draw_variants(self._path("variants"), shares))
        self._figure("importance", picture.draw_importance(self._path("importance"), main[: len(ablated)], importances))
        return claiming.correlation_claims(correlations, shares, losses_by_group(self.trained), related)

    def _sources(self) -> list[Claim]:
        found = [find_sources(self.db.run(item.training.runs[0])) for item in self.main]
        shape = self.db.run(self.main[0].training.runs[0]).weight("W_E").shape
        sums = gaussian_cosines((80, shape[1]), n=100)[2]
        return claiming.source_claims(found, gaussian_cosines(shape), sums)

    def _experiments(self) -> list[Claim]:
        """The five experiments on untrained tiny models and on random networks, as many as variants have seeds."""
        n = self.extent.n_variant_seeds
        tiny = [item.training.runs[0] for item in self.main[:n]]
        random = [f"random-seed{self.seed + i}" for i in range(n)]
        for name in tiny:
            harvest_structured(self.db.run(name), self.options.db)
        for i, name in enumerate(random):
            harvest_random(name, self.options.db, seed=self.seed + i)
        self.db.refresh()
        claims = []
        for kind, names in (("tiny", tiny), ("random", random)):
            pairs = [(self.db.run(name), self.db.run(f"{name}-structured")) for name in names]
            found = [experiment.run_experiments(self.db, *pair, seed=self.seed) for pair in pairs]
            claims += claiming.experiment_claims(kind, found, seed=self.seed)
        return claims

    def _toolkit(self) -> list[Claim]:
        run = harvest_structured(self.db.run(self.main[0].training.runs[-1]), self.options.db)
        self.db.refresh()
        found = apply_toolkit(self.db, self.db.run(run.name), seed=self.seed)
        before = head_roles(self.db, self.main[0].training.runs[0])
        self.roles = {"untrained": before, "trained": found.roles}
        return claiming.toolkit_claims(found, seed=self.seed)

    def _draw(self, main: Sequence[History], seeds: Sequence[Claim]) -> None:
        title = f"Selectivity through training, seed {self.seed}"
        self._figure("selectivity", picture.draw_selectivity(self._path("selectivity"), main[0], title=title))
        title = f"Persistence over {len(main)} seeds"
        self._figure("persistence", picture.draw_persistence(self._path("persistence"), main, title=title))
        self._figure("shares", picture.draw_shares(self._path("shares"), seeds))

    def _path(self, name: str) -> Path:
        return self.options.figures / f"{name}.png"

    def _figure(self, name: str, caption: str) -> None:
        self.figures[f"figures/{name}.png"] = caption


def _sections(claims: Sequence[Claim], roles: Mapping[str, Mapping[tuple[int, int], str]]) -> dict[str, str]:
    """What the figures say, in words, for the report."""
    by_key = {claim.key: claim for claim in claims}
    top, every = by_key["seeds.position_minus_token"], by_key["seeds.position_minus_token_all"]
    kept = by_key["track.maintained_top"]
    return {
        "Does position persist more than token?": (
            f"Top neurons: position − token = {top.value:+.2f} [{top.low:+.2f}, {top.high:+.2f}], {top.verdict}. "
            f"All neurons: {every.value:+.2f} [{every.low:+.2f}, {every.high:+.2f}], {every.verdict}."
        ),
        "How many features are maintained?": (
            f"{kept.value:.0%} [{kept.low:.0%}, {kept.high:.0%}] of the 20 most selective over {kept.n} seeds; "
            "the original says about 60 %, and counts 11 of 20 at seed 42."
        ),
        "What do the heads do?": "\n".join(
            f"- {state}: " + ", ".join(f"head {layer}.{head} {role}" for (layer, head), role in found.items())
            for state, found in roles.items()
        ),
        "What to keep in mind": (
            f"Without a causal mask the {N_VOCABULARY} tokens that are to be predicted can be read from the input, so "
            "the loss says little about learning; the group `causal` has the mask. Rows of one sequence are not "
            "independent, so p values of the analysis of variance are too small; η² and the shuffled nulls are not "
            "touched by that."
        ),
    }
