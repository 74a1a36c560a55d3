"""What a subspace holds: the stored rows nearest to a row in it, and what these have in common.

The preimage of a row in a subspace are the inputs whose rows come nearest to it there (arXiv 2508.01916, section 5),
found by `db.nearest` in a stored partition. What a subspace holds is then asked of many rows: the attribute (the token
at the row, the one before, the position, a label of the prompt …) that neighbours share with their query more than rows
do by chance.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy import stats

import actdb
from analyses.common.significance import Estimate, mean_interval
from analyses.subspace_partition.partition import Partition

OFFSETS = {"this token": 0, "previous token": -1, "token two back": -2, "next token": 1}
POSITION = "position"
NONE = -1
"""The value of an attribute that a row does not have, such as the token before the first; it equals no other."""
LEAST_GAIN = 0.5
"""A subspace is named after an attribute that its neighbours share at least so much more than chance."""
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Place:
    """A subspace of a stored partition of one site and layer of a run."""

    run: str
    site: str
    layer: int
    partition: str
    subspace: int

    def nearest(self, db: actdb.Database, *, prompt: int, pos: int, k: int = 10, **options: Any) -> actdb.Nearest:
        """Return the preimage of a stored row: the `k` rows nearest to it in the subspace, with prompts in context.

        By cosine, in an index where one was made for this subspace. Others of its own prompt are left out: they may
        share its context rather than what the subspace holds. `options` are those of `db.nearest`.
        """
        given = {"metric": "cosine", "exclude_prompt": True, **options}
        return db.nearest(
            self.site,
            run=self.run,
            layer=self.layer,
            partition=self.partition,
            subspace=self.subspace,
            prompt=prompt,
            pos=pos,
            k=k,
            **given,
        )


class Attributes:
    """What is known of each stored row of a site: tokens around it, its position, labels of its prompt, as numbers."""

    def __init__(self, run: actdb.Run, site: str, *, labels: Mapping[str, Sequence[Any]] | None = None) -> None:
        """Read the tokens of all prompts; `labels` are values by prompt_id."""
        selection = run[site]
        self.prompt, self.pos = np.asarray(selection.prompt, np.int64), np.asarray(selection.pos, np.int64)
        lengths = np.array([len(run.tokens(prompt)) for prompt in range(run.n_prompts)])
        tokens = np.concatenate([run.tokens(prompt) for prompt in range(run.n_prompts)]).astype(np.int64)
        starts = np.cumsum(lengths) - lengths
        self.values: dict[str, Ints] = {}
        for name, offset in OFFSETS.items():
            at = self.pos + offset
            inside = (at >= 0) & (at < lengths[self.prompt])
            self.values[name] = np.where(inside, tokens[starts[self.prompt] + np.where(inside, at, 0)], NONE)
        self.values[POSITION] = self.pos
        for name, values in (labels or {}).items():
            self.values[name] = pd.factorize(np.asarray(values, object))[0].astype(np.int64)[self.prompt]
        self._places = pd.MultiIndex.from_arrays([self.prompt, self.pos])

    def __len__(self) -> int:
        return len(self.prompt)

    def rows(self, prompt: Sequence[int], pos: Sequence[int]) -> Ints:
        """Return the places of rows, by prompt and position; raises `SelectionError` for rows that are not stored."""
        found = self._places.get_indexer(pd.MultiIndex.from_arrays([prompt, pos]))
        if (found < 0).any():
            raise actdb.SelectionError("attributes: not all of these rows are stored")
        return np.asarray(found, np.int64)

    def chance(self, name: str) -> float:
        """Return how often two rows drawn at random share a value."""
        values = self.values[name]
        counts = np.bincount(values[values != NONE])
        return float(np.square(counts / len(values)).sum())


@dataclass(frozen=True)
class Shared:
    """A value that neighbours have in common: its share among them, among all rows, and the odds of that.

    `p` is the chance of so many among rows drawn without regard to it (hypergeometric), times the attributes asked.
    """

    attribute: str
    value: int
    share: float
    base: float
    p: float


def common_values(attributes: Attributes, rows: Ints) -> list[Shared]:
    """Return the commonest value of each attribute among rows, the least likely first: what all of them share."""
    found = []
    for name, values in attributes.values.items():
        own = values[rows]
        own = own[own != NONE]
        if not len(own):
            continue
        value = int(np.bincount(own).argmax())
        n, n_base = int((own == value).sum()), int((values == value).sum())
        p = float(stats.hypergeom.sf(n - 1, len(values), n_base, len(rows))) * len(attributes.values)
        found.append(Shared(name, value, n / len(rows), n_base / len(values), min(p, 1.0)))
    return sorted(found, key=lambda shared: (shared.p, -shared.share))


@dataclass(frozen=True)
class Agreement:
    """How often the neighbours of a row share its value of an attribute: mean over rows, and among random rows."""

    attribute: str
    share: Estimate
    chance: float

    @property
    def gain(self) -> float:
        """The share above chance, 1 where all neighbours share it."""
        return (self.share.value - self.chance) / (1 - self.chance)


def measure_agreement(
    db: actdb.Database,
    place: Place,
    attributes: Attributes,
    *,
    n_queries: int,
    k: int = 10,
    where: str | None = None,
    seed: int,
) -> list[Agreement]:
    """Ask the neighbours of random rows in a subspace what they share with their query; the greatest gain first.

    Neighbours are sought among prompts that satisfy `where`: among very many rows the nearest ones are alike in all
    that there is, whatever the subspace. Rows that do not have an attribute are not asked for it. Costs `n_queries`
    searches.
    """
    drawn = np.random.default_rng((seed, 36)).choice(len(attributes), min(n_queries, len(attributes)), replace=False)
    shares: dict[str, list[float]] = {name: [] for name in attributes.values}
    for row in np.sort(drawn).tolist():
        at = {"prompt": int(attributes.prompt[row]), "pos": int(attributes.pos[row])}
        table = place.nearest(db, **at, k=k, where=where).df()
        neighbours = attributes.rows(table["prompt_id"].tolist(), table["pos"].tolist())
        for name, values in attributes.values.items():
            if values[row] != NONE:
                shares[name].append(float((values[neighbours] == values[row]).mean()))
    found = [
        Agreement(name, mean_interval(each, within=(0.0, 1.0)), attributes.chance(name))
        for name, each in shares.items()
        if each
    ]
    return sorted(found, key=lambda agreement: -agreement.gain)


def name_subspaces(agreements: Sequence[Sequence[Agreement]]) -> tuple[str, ...]:
    """Return a name for each subspace: its attribute of greatest gain, or its number where that is below `LEAST_GAIN`.

    Where two subspaces share most by the same attribute, their numbers are added.
    """
    best = [max(each, key=lambda agreement: agreement.gain) for each in agreements]
    names = [found.attribute if found.gain >= LEAST_GAIN else f"subspace {i}" for i, found in enumerate(best)]
    return tuple(name if names.count(name) == 1 else f"{name} ({i})" for i, name in enumerate(names))


def explained_variance(rows: npt.NDArray[Any], partition: Partition, groups: Ints) -> npt.NDArray[np.float64]:
    """Return, for each subspace, the share of its rows' variance that lies between groups (η²), [subspace].

    Rows [row, width]; groups [row] of numbers, `NONE` left out. 1: the subspace is a function of the group; by chance
    (groups − 1) / (rows − 1).
    """
    kept = groups != NONE
    codes, names = pd.factorize(groups[kept])
    found = []
    for own in partition.project(np.asarray(rows)[kept]):
        centred = own.astype(np.float64) - own.mean(0, dtype=np.float64)
        sums = np.zeros((len(names), own.shape[1]))
        np.add.at(sums, codes, centred)
        between = np.square(sums).sum(1) / np.bincount(codes, minlength=len(names))
        found.append(between.sum() / np.square(centred).sum())
    return np.asarray(found, np.float64)
