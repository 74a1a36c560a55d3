"""What subspaces hold: preimages, shared attributes and explained variance, on rows put together by hand."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from scipy import stats

import actdb
from analyses.subspace_partition.interpretation import (
    NONE,
    Attributes,
    Place,
    common_values,
    explained_variance,
    measure_agreement,
    name_subspaces,
)
from analyses.subspace_partition.partition import Partition, store_partition
from analyses.subspace_partition.strength import random_rotation

N_TOKENS, N_PROMPTS, LENGTH, SIZES = 6, 40, 9, (4, 4, 2)


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """Rows of three orthogonal subspaces: this token, previous token, noise; turned at random, with a label."""
    root = tmp_path_factory.mktemp("interpretation")
    generator = np.random.default_rng(0)
    tokens = generator.integers(0, N_TOKENS, (N_PROMPTS, LENGTH))
    before = np.concatenate([np.full((N_PROMPTS, 1), N_TOKENS), tokens[:, :-1]], 1)
    vectors = generator.standard_normal((2, N_TOKENS + 1, 4))
    noise = generator.standard_normal((N_PROMPTS, LENGTH, 2))
    parts = np.concatenate([vectors[0][tokens], vectors[1][before], noise], 2)
    parts += 0.01 * generator.standard_normal(parts.shape)
    partition = Partition(random_rotation(generator, sum(SIZES)).astype(np.float32), SIZES)
    rows = torch.from_numpy((parts @ partition.rotation.T).astype(np.float32))
    save_file({"blocks.0.hook_resid_post": rows.contiguous()}, root / "rows.safetensors")
    prompts = [{"tokens": row, "kind": "ab"[i % 2]} for i, row in enumerate(tokens.tolist())]
    db = root / "x.actdb"
    run = actdb.import_activations(
        root / "rows.safetensors", prompts, out=db, run="planted", sites=["resid_post"], store="float32"
    )
    with actdb.open(db, mode="a") as held:
        store_partition(held, run, "made", partition, site="resid_post", layer=0)
    return SimpleNamespace(db=db, run=run, tokens=tokens, partition=partition)


@pytest.fixture(scope="module")
def attributes(planted: SimpleNamespace) -> Attributes:
    return Attributes(planted.run, "resid_post", labels={"kind": ["ab"[i % 2] for i in range(N_PROMPTS)]})


def place(subspace: int) -> Place:
    return Place("planted", "resid_post", 0, "made", subspace)


def test_a_preimage_has_the_token_that_the_subspace_holds(planted: SimpleNamespace) -> None:
    with actdb.open(planted.db) as db:
        for subspace, back in ((0, 0), (1, 1)):
            found = place(subspace).nearest(db, prompt=3, pos=4, k=8).df()
            others = [planted.tokens[row.prompt_id, row.pos - back] for row in found.itertuples()]
            assert others == [planted.tokens[3, 4 - back]] * 8
            assert (found.prompt_id != 3).all()
            assert found.context.str.len().min() > 0


def test_attributes_are_those_of_the_tokens(planted: SimpleNamespace, attributes: Attributes) -> None:
    assert len(attributes) == N_PROMPTS * LENGTH
    rows = attributes.rows([7, 7, 7], [0, 4, LENGTH - 1])
    assert attributes.values["this token"][rows].tolist() == planted.tokens[7, [0, 4, LENGTH - 1]].tolist()
    assert attributes.values["previous token"][rows].tolist() == [NONE, *planted.tokens[7, [3, LENGTH - 2]]]
    assert attributes.values["next token"][rows].tolist() == [*planted.tokens[7, [1, 5]], NONE]
    assert attributes.values["position"][rows].tolist() == [0, 4, LENGTH - 1]
    assert len(set(attributes.values["kind"][rows])) == 1
    assert attributes.chance("kind") == pytest.approx(0.5)
    counts = np.bincount(planted.tokens.ravel()) / planted.tokens.size
    assert attributes.chance("this token") == pytest.approx((counts**2).sum())
    with pytest.raises(actdb.SelectionError, match="not all of these rows"):
        attributes.rows([0], [LENGTH])


def test_neighbours_say_what_each_subspace_holds(planted: SimpleNamespace, attributes: Attributes) -> None:
    with actdb.open(planted.db) as db:
        agreements = [measure_agreement(db, place(i), attributes, n_queries=12, k=5, seed=0) for i in range(3)]
    assert agreements[0][0].attribute == "this token"
    assert agreements[1][0].attribute == "previous token"
    for found in agreements[:2]:
        assert found[0].share.value > 0.98
        assert found[1].gain < 0.3
    assert agreements[2][0].gain < 0.3  # noise shares nothing
    assert name_subspaces(agreements) == ("this token", "previous token", "subspace 2")
    assert name_subspaces([agreements[0], agreements[0]]) == ("this token (0)", "this token (1)")


def test_what_all_rows_share_is_judged_by_the_odds(attributes: Attributes) -> None:
    values = attributes.values["this token"]
    rows = np.flatnonzero(values == 2)[:7]
    best = common_values(attributes, rows)[0]
    assert (best.attribute, best.value, best.share) == ("this token", 2, 1.0)
    n = int((values == 2).sum())
    expected = np.prod([(n - i) / (len(values) - i) for i in range(7)]) * len(attributes.values)
    assert best.p == pytest.approx(expected)
    drawn = common_values(attributes, np.arange(0, len(values), 41))
    assert drawn[0].p > 0.01
    assert stats.hypergeom.sf(6, len(values), n, 7) * len(attributes.values) == pytest.approx(best.p)


def test_explained_variance_is_that_between_groups(planted: SimpleNamespace, attributes: Attributes) -> None:
    rows = planted.run["resid_post"].sel(layer=0).numpy()
    this = explained_variance(rows, planted.partition, attributes.values["this token"])
    previous = explained_variance(rows, planted.partition, attributes.values["previous token"])
    assert this[0] > 0.99
    assert previous[1] > 0.99
    assert max(this[1:].max(), previous[0], previous[2]) < 0.1
    # held to one-way analysis of variance of each column
    own = rows @ planted.partition.basis(2)
    groups = [own[attributes.values["this token"] == token] for token in range(N_TOKENS)]
    f = stats.f_oneway(*groups).statistic
    between = f * (N_TOKENS - 1)
    eta = between / (between + len(rows) - N_TOKENS)
    spread = own.var(0)
    assert this[2] == pytest.approx((eta * spread).sum() / spread.sum(), rel=1e-4)


def test_a_stored_partition_is_read_back(planted: SimpleNamespace) -> None:
    with actdb.open(planted.db) as db:
        found = Partition.read(db, planted.run, "made")
    np.testing.assert_allclose(found.rotation, planted.partition.rotation, atol=1e-6)
    assert found.sizes == SIZES


def test_a_partition_that_is_not_there_is_refused(planted: SimpleNamespace, tmp_path: Path) -> None:
    with actdb.open(planted.db) as db, pytest.raises(actdb.SettingError, match="has no partition"):
        Place("planted", "resid_post", 0, "other", 0).nearest(db, prompt=0, pos=1)
