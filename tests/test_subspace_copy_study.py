"""The study of copy transformers and of external folders, end to end at a tiny size: every step, claim and figure."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import actdb
from analyses.common.report import Claim
from analyses.subspace_partition import __main__ as program
from analyses.subspace_partition import hand_built
from analyses.subspace_partition.copy_extent import Extent
from analyses.subspace_partition.copy_study import CopyStudy
from analyses.subspace_partition.copying import SITES, Copier
from analyses.subspace_partition.external_study import ExternalExtent, study_external
from analyses.subspace_partition.partition import store_partition
from analyses.subspace_partition.sequence import Task, paired_prompts
from analyses.subspace_partition.training import Recipe

RECIPE = Recipe(
    unit=4,
    n_queries=32,
    n_key_blocks=2,
    learning_rate=3e-3,
    first_merge=4,
    merge_every=4,
    n_steps=16,
    stop_at_n_subspaces=2,
    information_keys=256,
    information_queries=64,
)
TINY = Extent(
    copier=Copier("tiny", Task(8, (2, 5)), n_steps=8, batch=8),
    checkpoints=(0, 4),
    recipe=RECIPE,
    block_rows=128,
    n_row_prompts=120,
    n_prompts=12,
    n_pairs=6,
    pair_length=4,
    n_queries=5,
    n_few_keys=128,
    n_keys=8192,
    n_null=12,
    n_starts=1,
)


def by_key(claims: list[Claim]) -> dict[str, Claim]:
    assert len({claim.key for claim in claims}) == len(claims), "keys must differ: they are rows of a table"
    return {claim.key: claim for claim in claims}


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Figures are drawn and not rendered; the names of their files."""
    names: list[str] = []
    monkeypatch.setattr("analyses.common.figure.save", lambda figure, path: names.append(path.name))
    return names


@pytest.mark.parametrize("kind", ["token", "bigram"])
def test_every_step_of_the_study_runs(kind: str, tmp_path: Path, drawn: list[str]) -> None:
    copier = TINY.copier
    if kind == "bigram":
        copier = replace(copier, task=Task(8, (4, 6), "bigram", 4), n_heads=2)
    extent = replace(TINY, copier=copier, pair_length=4)
    study = CopyStudy(extent, db=tmp_path / "x.actdb", figures=tmp_path / "figures", seed=1)
    found = study.all()
    claims = by_key(found.claims)
    assert found.run == "tiny-step8"
    assert claims["tiny.subspaces"].value == 2
    assert claims["tiny.information.1"].value > 0
    assert claims["tiny.information.2"].value > 0
    assert ("tiny.two_back.L0H0" in claims) == (kind == "bigram")
    n_heads = copier.n_heads
    assert len([edge for edge in study.effects if edge.source == "stream"]) == n_heads * 3 * 2
    assert len(study.effects) == n_heads * (1 + n_heads) * 3 * 2
    assert "tiny.edge.others" in claims
    assert all(claim.verdict for claim in found.claims)
    names = {"patterns", "training", "neighbours", "circuit", "strengths", "effects"}
    assert set(drawn) == {f"tiny-{name}.png" for name in names}
    assert set(found.figures) == {f"figures/{name}" for name in drawn}
    content = json.loads((tmp_path / "tiny-circuit.json").read_text())
    heads = {node["id"] for node in content["nodes"] if node["kind"] == "component"} - {"residual"}
    assert heads == {f"L{layer}H{head}" for layer in (0, 1) for head in range(n_heads)}
    measured = [edge for edge in content["edges"] if edge["effect"] is not None]
    assert {edge["kind"] for edge in measured} == {"query", "key", "value"}
    with actdb.open(tmp_path / "x.actdb") as db:
        assert db.sql("SELECT sum(size), count(*) FROM partitions WHERE partition = 'ndm'").fetchone() == (16, 2)
        near = db.nearest("resid_post", run="tiny-rows", layer=0, prompt=3, pos=1, partition="ndm", subspace=1, k=3)
        assert len(near.fetchall()) == 3


def test_an_external_folder_is_studied(tmp_path: Path, build: Callable[..., Any], drawn: list[str]) -> None:
    shape = {"vocab_size": 14, "n_positions": 17, "bos_token_id": 10, "eos_token_id": 12, "pad_token_id": 13}
    build("gpt2", **shape).save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "acc.txt").write_text("x eval_len0-3_acc: 1.0 eval_len4-7_acc: 0.9905 eval_len50-60_acc: 1.0")
    extent = ExternalExtent(n_prompts=8, n_lengths=14)
    db = tmp_path / "x.actdb"
    found = study_external(tmp_path / "model", db, figures=tmp_path / "figures", extent=extent, seed=0)
    claims = by_key(found.claims)
    assert claims["model.exact.0-3"].n == 6
    assert claims["model.exact.4-7"].claimed == 0.9905
    assert claims["model.exact.4-7"].verdict == "below the claim"  # untrained
    assert "model.exact.50-60" not in claims  # longer than its context
    assert claims["model.without.L1H3"].verdict == "redundant"
    assert drawn == ["model-patterns.png"]
    assert found.run == "model"
    assert all(claim.verdict for claim in found.claims)


def test_the_program_draws_the_circuit_of_stored_partitions(
    tmp_path: Path, drawn: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    db, out = tmp_path / "x.actdb", tmp_path / "out"
    model, plane = hand_built.build_hand_built()
    prompts = paired_prompts(hand_built.TASK, 3, length=4, seed=0)
    run = actdb.harvest(model, prompts, out=db, run="hand", sites=SITES, store="float32")
    arguments = ["--circuit", "--db", str(db), "--size", "small", "--out", str(out)]
    assert program.main(arguments) == 1
    assert "has no such partition of its residual stream" in capsys.readouterr().err
    with actdb.open(db, mode="a") as held:
        store_partition(held, run, "known", plane.partition, site="resid_post", layer=0)
    assert program.main(arguments) == 0
    results = {entry["key"]: entry for entry in json.loads((out / "results.json").read_text())["results"]}
    assert set(results) == {"edge.qk.1", "edge.ov.2", "edge.ov.3"}  # L1H0 matches, L0H0 and L1H0 copy: all there is
    assert set(drawn) == {"hand-circuit.png", "hand-strengths.png"}
    report = (out / "report.md").read_text()
    assert "| L0H0 | resid_post 0: 1 | L1H0 | key |" in report  # from what was put in, without its names
    assert json.loads((out / "hand-circuit.json").read_text())["about"]["model"] == "hand-built-copier"
    with actdb.open(db, mode="a") as held:
        store_partition(held, run, "twice", plane.partition, site="resid_post", layer=0)
    assert program.main(arguments) == 1
    assert "two partitions of resid_post 0" in capsys.readouterr().err
    assert program.main(["--circuit", "--db", str(tmp_path / "none.actdb"), "--out", str(out)]) == 1
    assert "name one whose run has stored partitions" in capsys.readouterr().err
