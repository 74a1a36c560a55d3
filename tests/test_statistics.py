"""Head statistics equal plain NumPy loops over the stored arrays."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hooked import TinyModel, random_prompts

import actdb

COLUMNS = (
    "entropy",
    "first_mass",
    "prev_mass",
    "self_mass",
    "duplicate_mass",
    "induction_mass",
    "mean_distance",
    "max_weight",
    "z_norm",
    "result_norm",
)


def mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None


def statistics(w: np.ndarray, tokens: list[int], z: np.ndarray, w_o: np.ndarray | None) -> tuple[float | None, ...]:
    """The definitions, written as loops: w [query, key], z [query, d_head], w_o [d_head, d_model]."""
    n = len(tokens)
    duplicate, induction = [], []
    for q in range(n):
        copies = [w[q, k] for k in range(q) if tokens[k] == tokens[q]]
        after = [w[q, k] for k in range(1, q + 1) if tokens[k - 1] == tokens[q]]
        duplicate += [sum(copies)] if copies else []
        induction += [sum(after)] if after else []
    return (
        mean([-sum(x * np.log(x) for x in w[q] if x > 0) for q in range(n)]),
        mean([w[q, 0] for q in range(1, n)]),
        mean([w[q, q - 1] for q in range(1, n)]),
        mean([w[q, q] for q in range(n)]),
        mean(duplicate),
        mean(induction),
        mean([sum(w[q, k] * (q - k) for k in range(n)) for q in range(n)]),
        mean([w[q].max() for q in range(n)]),
        mean([float(np.linalg.norm(z[q])) for q in range(n)]),
        None if w_o is None else mean([float(np.linalg.norm(z[q] @ w_o)) for q in range(n)]),
    )


def stored_statistics(db: actdb.Database, run: str) -> dict[tuple[int, int, int], tuple[Any, ...]]:
    rows = db.sql(
        f"SELECT prompt_id, layer, head, {', '.join(COLUMNS)} FROM head_stats WHERE run = ?", [run]
    ).fetchall()
    return {row[:3]: row[3:] for row in rows}


PROMPTS = [*random_prompts(12, d_vocab=5, longest=9), {"tokens": [3]}, {"tokens": [0, 1, 2]}]
"""Tokens that repeat, one that stands alone, and some without any repetition."""


def check_statistics(path: Path, run: actdb.Run) -> None:
    """Compare every column with the loops over the stored arrays."""
    with actdb.open(path) as db:
        found = stored_statistics(db, run.name)
    assert sorted(found) == [(p, layer, head) for p in range(len(PROMPTS)) for layer in range(2) for head in range(4)]
    nulls = 0
    for (prompt, layer, head), values in found.items():
        w = run["pattern"].sel(layer=layer, head=head, prompt=prompt).numpy().astype(np.float64)
        z = run["z"].sel(layer=layer, head=head, prompt=prompt).numpy().astype(np.float64)
        w_o = run.weight("W_O", layer=layer, head=head).astype(np.float64)
        wanted = statistics(w, run.tokens(prompt).tolist(), z, w_o)
        for name, value, want in zip(COLUMNS, values, wanted, strict=True):
            nulls += want is None
            assert (value is None) == (want is None), (prompt, name)
            assert value is None or abs(value - want) <= 2e-6 * max(1.0, abs(want)), (prompt, layer, head, name)
    assert nulls > 0


@pytest.mark.parametrize("causal", [True, False])
def test_every_column_equals_the_loops(tmp_path: Path, causal: bool) -> None:
    module = TinyModel(causal=causal, n_heads=4, n_kv_heads=2)
    run = actdb.harvest(module, PROMPTS, tmp_path / "x.actdb", store="float32", batch_tokens=30, sites=["pattern", "z"])
    check_statistics(tmp_path / "x.actdb", run)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("gpt2", {}),
        ("gpt2", {"processing": "folded"}),
        ("gpt2", {"dtype": "bfloat16"}),
        ("llama", {"part_tokens": 20}),
        ("bert", {}),
    ],
)
def test_every_column_of_real_architectures(
    model_folder: Any, tmp_path: Path, kind: str, settings: dict[str, Any]
) -> None:
    """Grouped queries, folded weights, half precision (statistics are float32 all the same), squares."""
    run = actdb.harvest(model_folder(kind), PROMPTS, tmp_path / "x.actdb", store="float32", batch_tokens=40, **settings)
    assert run.info.causal == (kind != "bert")
    check_statistics(tmp_path / "x.actdb", run)


def test_layers_keep_their_numbers(tmp_path: Path) -> None:
    out = tmp_path / "x.actdb"
    actdb.harvest(TinyModel(), PROMPTS, out, run="both", sites="none")
    actdb.harvest(TinyModel(), PROMPTS, out, run="second", sites="none", layers=[1])
    with actdb.open(out) as db:
        both, second = stored_statistics(db, "both"), stored_statistics(db, "second")
    assert second == {key: row for key, row in both.items() if key[1] == 1}


def test_statistics_do_not_depend_on_what_is_stored_or_on_batches(tmp_path: Path) -> None:
    prompts, keep = random_prompts(20, d_vocab=6), {"store": "float32"}
    out = tmp_path / "x.actdb"
    actdb.harvest(TinyModel(), prompts, out, run="all", **keep)
    actdb.harvest(TinyModel(), prompts, out, run="last", positions="last", **keep)
    actdb.harvest(TinyModel(), prompts, out, run="none", sites="none", **keep)
    actdb.harvest(TinyModel(), prompts, out, run="single", batch_tokens=1, part_tokens=20, **keep)
    actdb.harvest(TinyModel(), prompts, out, run="half")
    actdb.harvest(TinyModel(), prompts, out, run="without", stats=())
    with actdb.open(out) as db:
        whole = stored_statistics(db, "all")
        assert len(whole) == 20 * 2 * 2
        for run in ("last", "none", "single", "half"):
            other = stored_statistics(db, run)
            assert other.keys() == whole.keys()
            for key, values in whole.items():
                for a, b in zip(values, other[key], strict=True):
                    assert (a is None) == (b is None)
                    assert a is None or abs(a - b) <= 1e-5 * max(1.0, abs(a))
        assert stored_statistics(db, "without") == {}
        assert db.run("none").sites == ()


def test_roles_follow_the_rule(tmp_path: Path) -> None:
    """Each head's role is that of its greatest mean mass, from 0.4 on; uniform from 0.9 of even attention on."""
    actdb.harvest(TinyModel(), PROMPTS, tmp_path / "x.actdb", run="own")
    with actdb.open(tmp_path / "x.actdb") as db:
        found = db.sql("SELECT * FROM head_roles ORDER BY layer, head").df()
        stats = db.sql("SELECT * FROM head_stats JOIN run_prompts USING (run, prompt_id)").df()
    names = ("previous", "first", "self", "duplicate", "induction")
    sources = ("prev_mass", "first_mass", "self_mass", "duplicate_mass", "induction_mass")
    assert len(found) == stats.groupby(["layer", "head"]).ngroups
    for row in found.itertuples():
        held = stats[(stats["layer"] == row.layer) & (stats["head"] == row.head)]
        scores = {name: float(held[source].mean()) for name, source in zip(names, sources, strict=True)}
        for name in names:
            assert getattr(row, name) == pytest.approx(scores[name], abs=1e-6)
        even = np.mean([np.log(np.arange(1, n + 1)).mean() for n in held["n_tokens"]])
        uniform = float(held["entropy"].mean() / even)
        assert row.uniform == pytest.approx(uniform, abs=1e-6)
        best = max(scores, key=lambda name: scores[name])
        wanted = best if scores[best] >= 0.4 else "uniform" if uniform >= 0.9 else None
        assert (row.role if isinstance(row.role, str) else None) == wanted
