"""Comparing runs: the changes of heads and neurons are those that NumPy finds in the same statistics."""

import json
from collections.abc import Sequence
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hooked import TinyModel, random_prompts

import actdb
from actdb.catalog.comparison import HEAD_MEASURES, NEURON_MEASURES
from actdb.cli import main

PROMPTS = random_prompts(25, longest=9, d_vocab=6)  # few tokens, so that some prompts repeat one and others do not
RUNS = ("random", "early", "late")


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a database of three models of one shape over one prompt set, and of one over another."""
    out = tmp_path_factory.mktemp("compare") / "x.actdb"
    for seed, run in enumerate(RUNS):
        options: dict[str, Any] = {"step": None if run == "random" else seed, "stats": ["heads", "neurons"]}
        actdb.harvest(TinyModel(seed=seed), PROMPTS, out, run=run, part_tokens=40, batch_tokens=20, **options)
    actdb.harvest(TinyModel(), random_prompts(5), out, run="elsewhere")
    actdb.harvest(TinyModel(n_heads=4), PROMPTS, out, run="heads4", sites="none", stats=["heads"])
    actdb.harvest(TinyModel(d_model=12), PROMPTS, out, run="wide")
    actdb.harvest(TinyModel(seed=9), PROMPTS, out, run="bare", sites=["z"], stats=())
    return out


def head_values(db: actdb.Database, run: str, measure: str) -> dict[tuple[int, int], dict[int, float | None]]:
    """Return a measure of each head by prompt."""
    found: dict[tuple[int, int], dict[int, float | None]] = {}
    query = f"SELECT layer, head, prompt_id, {measure} FROM head_stats WHERE run = ?"
    for layer, head, prompt, value in db.sql(query, [run]).fetchall():
        found.setdefault((layer, head), {})[prompt] = value
    return found


def paired_change(a: dict[int, float | None], b: dict[int, float | None]) -> tuple[Any, ...] | None:
    """Return means, change, d_av, d_z and number of the prompts where neither is None; None without any."""
    shared = [(a[p], b[p]) for p in sorted(a.keys() & b.keys()) if a[p] is not None and b[p] is not None]
    if not shared:
        return None
    before, after = np.array(shared, np.float64).T
    difference = after - before
    change = difference.mean()
    if len(shared) < 2:
        return before.mean(), after.mean(), change, 0 if change == 0 else None, 0 if change == 0 else None, 1
    own, spread = (before.std(ddof=1) + after.std(ddof=1)) / 2, difference.std(ddof=1)
    effects = [change / s if s > 0 else 0 if change == 0 else None for s in (own, spread)]
    return before.mean(), after.mean(), change, *effects, len(shared)


def near(found: Sequence[Any], wanted: Sequence[Any]) -> bool:
    return all((f is None) == (w is None) for f, w in zip(found, wanted, strict=True)) and np.allclose(
        [f for f in found if f is not None], [w for w in wanted if w is not None], rtol=1e-9, atol=1e-12
    )


def test_head_changes_are_those_of_numpy(path: Path) -> None:
    columns = "measure, layer, head, role_a, role_b, mean_a, mean_b, change, effect, paired_effect, n_prompts"
    with actdb.open(path) as db:
        roles = {row[:3]: row[3] for row in db.sql("SELECT run, layer, head, role FROM head_roles").fetchall()}
        n_rows = n_partly = 0
        for run_a, run_b in permutations(RUNS, 2):
            query = f"SELECT {columns} FROM head_changes WHERE run_a = ? AND run_b = ?"
            rows = {row[:3]: row[3:] for row in db.sql(query, [run_a, run_b]).fetchall()}
            wanted = {}
            for measure in HEAD_MEASURES:
                before, after = head_values(db, run_a, measure), head_values(db, run_b, measure)
                for head in before:
                    change = paired_change(before[head], after[head])
                    if change is not None:
                        wanted[(measure, *head)] = (roles[(run_a, *head)], roles[(run_b, *head)], *change)
                        n_partly += change[-1] < len(PROMPTS)
            assert rows.keys() == wanted.keys()
            for key, row in rows.items():
                assert row[:2] == wanted[key][:2]
                assert near(row[2:], wanted[key][2:]), (key, row, wanted[key])
            n_rows += len(rows)
        assert n_rows >= 6 * 4 * 10
        assert n_partly  # the measures that some prompts lack were among them
        counted = db.sql("SELECT count(*) FROM head_changes WHERE run_a IN ? AND run_b IN ?", [RUNS, RUNS]).fetchone()
        assert counted == (n_rows,)


def test_neuron_changes_are_those_of_numpy(path: Path) -> None:
    column_of = {"mean": "mean_effect", "std": "std_effect", "skew": "skew_change"}
    column_of["active_fraction"] = "active_fraction_change"
    with actdb.open(path) as db:
        kept = {}
        for run in RUNS:
            values = db.run(run)["mlp_post"].numpy().astype(np.float64)  # [layer, row, neuron]
            skew = ((values - values.mean(1, keepdims=True)) ** 3).mean(1) / values.std(1) ** 3
            kept[run] = {"mean": values.mean(1), "std": values.std(1), "skew": skew}
            kept[run]["active_fraction"] = (values > 0).mean(1)
        for run_a, run_b in permutations(RUNS, 2):
            query = "SELECT * FROM neuron_changes WHERE run_a = ? AND run_b = ? ORDER BY layer, neuron"
            found = db.sql(query, [run_a, run_b]).df()
            a, b = kept[run_a], kept[run_b]
            assert len(found) == a["mean"].size
            pooled = np.sqrt((a["std"] ** 2 + b["std"] ** 2) / 2)
            for name in NEURON_MEASURES:
                unit = pooled if name in ("mean", "std") else 1
                change = (b[name] - a[name]) / unit
                for column, wanted in ((f"{name}_a", a[name]), (f"{name}_b", b[name]), (column_of[name], change)):
                    assert np.allclose(found[column], wanted.ravel(), atol=0.01, rtol=0.01), column


def test_heads_are_ranked_by_their_greatest_effect(path: Path) -> None:
    with actdb.open(path) as db:
        changes = db.sql("SELECT * FROM head_changes WHERE run_a = 'random' AND run_b = 'late'").df()
        changes["size"] = changes["effect"].abs()
        seen = changes[~changes["measure"].isin(["z_norm", "result_norm"])]
        best = seen.sort_values("size", ascending=False).groupby(["layer", "head"], sort=False).head(1)
        found = db.compare("random", "late").df()
        assert found["rank"].tolist() == list(range(4))
        check_rows(found, best)
        check_rows(db.compare("random", "late", k=2).df(), best[:2])
        one = db.compare("random", "late", measure="prev_mass").df()
        check_rows(one, changes[changes["measure"] == "prev_mass"].sort_values("size", ascending=False))
        norms = db.compare("random", "late", measure="z_norm").df()
        check_rows(norms, changes[changes["measure"] == "z_norm"].sort_values("size", ascending=False))
        back = db.compare("late", "random", measure="prev_mass").df()
        assert np.allclose(back["effect"], -one["effect"])
        assert (back["role_a"].fillna("") == one["role_b"].fillna("")).all()


def check_rows(found: Any, wanted: Any) -> None:
    """Assert that two frames have the same heads in the same order, with the same figures up to the order of sums."""
    keys, figures = ["layer", "head", "role_a", "role_b", "measure"], ["mean_a", "mean_b", "change", "effect"]
    assert found[keys].fillna("").to_numpy().tolist() == wanted[keys].fillna("").to_numpy().tolist()
    assert np.allclose(found[figures], wanted[figures])


@pytest.mark.parametrize("measure", [None, *NEURON_MEASURES])
def test_neurons_are_ranked(path: Path, measure: str | None) -> None:
    with actdb.open(path) as db:
        found = db.compare("early", "late", of="neurons", measure=measure).df()
        assert len(found) == 2 * 16
        sizes = found[NEURON_MEASURES[measure or "mean"]].abs()
        assert (sizes.diff().dropna() <= 0).all()
        assert sizes.isna().sum() < len(sizes)
        assert found["rank"].tolist() == list(range(len(found)))
        assert len({*zip(found["layer"], found["neuron"], strict=True)}) == len(found)


def test_a_planted_change_is_found(tmp_path: Path) -> None:
    """One head's queries and keys are set to 0, which makes its attention uniform; nothing else of layer 1 changes."""
    model, prompts = TinyModel(n_heads=4, n_kv_heads=4), random_prompts(25, longest=20)
    actdb.harvest(model, prompts, tmp_path / "x.actdb", run="before", sites=["mlp_post"])
    with torch.no_grad():
        model.blocks[1].attn.W_Q[2] = 0
        model.blocks[1].mlp.W_in[:, 5] = 0
    actdb.harvest(model, prompts, tmp_path / "x.actdb", run="after", sites=["mlp_post"])
    with actdb.open(tmp_path / "x.actdb") as db:
        heads = db.compare("before", "after").fetchall()
        assert heads[0][1:3] == (1, 2)
        assert heads[0][4] == "uniform"
        assert [row[9] for row in heads[1:]] == [0] * 7  # effects of heads that did not change
        dead = db.compare("before", "after", of="neurons", measure="active_fraction").df()
        first = dead.iloc[0]
        assert (first["layer"], first["neuron"], first["active_fraction_b"], first["std_b"]) == (1, 5, 0, 0)
        assert first["std_effect"] == pytest.approx(-np.sqrt(2))


def test_pairs_are_runs_over_one_prompt_set(path: Path) -> None:
    with actdb.open(path) as db:
        found = db.sql("SELECT run_a, run_b, step_a, step_b, model_a, model_b, random_seed_a FROM run_pairs").fetchall()
        steps = {"random": None, "early": 1, "late": 2}
        pairs = permutations([*RUNS, "heads4", "wide", "bare"], 2)
        wanted = [(a, b, steps.get(a), steps.get(b), "tiny", "tiny", None) for a, b in pairs]
        assert sorted(found) == sorted(wanted)
        shared = db.sql("SELECT DISTINCT layer, head FROM head_changes WHERE run_a = 'heads4' AND run_b = 'late'")
        assert sorted(shared.fetchall()) == [(0, 0), (0, 1), (1, 0), (1, 1)]


def test_a_partial_run_is_compared_over_the_prompts_that_it_holds(tmp_path: Path) -> None:
    out = tmp_path / "x.actdb"
    options: dict[str, Any] = {"part_tokens": 40, "batch_tokens": 20, "sites": ["mlp_post"]}
    actdb.harvest(TinyModel(), PROMPTS, out, run="whole", **options)
    half = actdb.harvest(TinyModel(seed=1), PROMPTS, out, run="half", worker=(0, 2), **options)
    assert half.status == "partial"
    with actdb.open(out) as db:
        held = {p for values in head_values(db, "half", "entropy").values() for p in values}
        assert 2 < len(held) < len(PROMPTS)
        assert {row[-1] for row in db.compare("whole", "half", measure="entropy").fetchall()} == {len(held)}
        with pytest.raises(
            actdb.SettingError, match="run 'half' has neuron statistics of 2 of 4 parts, .* run the same harvest"
        ):
            db.compare("whole", "half", of="neurons")


@pytest.mark.parametrize(
    ("runs", "options", "message"),
    [
        (("late", "late"), {}, "run 'late' is given twice"),
        (("late", "elsewhere"), {}, r"over different prompts \(prompt sets \w{12} and \w{12}\); harvest both models"),
        (("late", "heads4"), {}, "heads of runs 'late' and 'heads4' do not correspond: n_heads is 2 and 4"),
        (("late", "wide"), {"of": "neurons"}, "neurons of runs .* do not correspond: d_mlp is 16 and 24"),
        (
            ("bare", "late"),
            {},
            "run 'bare' has no statistics of heads: harvest with --stats heads, or .* actdb stats --run bare",
        ),
        (("late", "bare"), {"of": "neurons"}, "run 'bare' has no statistics of neurons: harvest with --stats neurons"),
        (("late", "early"), {"of": "layers"}, "of 'layers': choose one of heads, neurons"),
        (("late", "early"), {"measure": "mean"}, "measure 'mean' of heads: choose one of entropy, first_mass, .*"),
        (("late", "early"), {"of": "neurons", "measure": "max"}, "choose one of mean, std, skew, active_fraction"),
        (("late", "early"), {"k": 0}, "k 0: must be at least 1"),
    ],
)
def test_what_cannot_be_compared(path: Path, runs: tuple[str, str], options: dict[str, Any], message: str) -> None:
    with actdb.open(path) as db, pytest.raises(actdb.SettingError, match=message):
        db.compare(*runs, **options)


def test_wide_models_have_comparable_heads(path: Path) -> None:
    with actdb.open(path) as db:
        assert len(db.compare("late", "wide").fetchall()) == 4
        with pytest.raises(actdb.RunError, match="no run 'later' in .*; it holds random, early, late"):
            db.compare("late", "later")


def test_compare_command(path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["compare", str(path), "random", "late", "--measure", "entropy", "-k", "3", "--format", "json"])
    assert ended.value.code == 0
    printed = json.loads(capsys.readouterr().out)
    with actdb.open(path) as db:
        wanted = db.compare("random", "late", measure="entropy", k=3)
        assert tuple(printed[0]) == wanted.columns
        for found, row in zip(printed, wanted.fetchall(), strict=True):
            assert tuple(found.values())[:6] == row[:6]
            assert near(tuple(found.values())[6:], row[6:])
    with pytest.raises(SystemExit) as ended:
        main(["compare", str(path), "random", "elsewhere"])
    assert ended.value.code == 1
    assert "over different prompts" in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        main(["compare", str(path), "random", "late", "--of", "neurons", "-o", str(tmp_path / "n.csv")])
    assert ended.value.code == 0
    assert len((tmp_path / "n.csv").read_text().splitlines()) == 21
