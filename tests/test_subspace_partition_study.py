"""The program: toy (a) and the null in small, and the partition of a run and of a model of the user's."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformer_lens.config import TransformerBridgeConfig
from transformer_lens.model_bridge.sources.native import boot

import actdb
from analyses.subspace_partition import __main__ as program
from analyses.subspace_partition import study, toy
from analyses.subspace_partition.partition import Partition
from analyses.subspace_partition.planted import store_noise


def read(path: Path) -> dict[str, dict[str, Any]]:
    """Return the results of a study by key."""
    return {entry["key"]: entry for entry in json.loads((path / "results.json").read_text())["results"]}


def test_the_study_finds_the_groups_and_nothing_in_noise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study, "copy_studies", lambda *_, **__: [])
    monkeypatch.setattr(study, "SMALL", replace(toy.SMALL, n_seeds=1))
    shorter = {"first_merge": 600, "merge_every": 100, "n_steps": 900, "information_keys": 2000}
    monkeypatch.setattr(toy, "RECIPE", replace(toy.RECIPE, **shorter))
    monkeypatch.setattr(toy, "STOPPED", replace(toy.STOPPED, **shorter))
    assert program.main(["--size", "small", "--seed", "0", "--out", str(tmp_path)]) == 0
    found = read(tmp_path)
    assert found["toy_a.recovered"]["verdict"] == "holds"
    assert found["toy_a.overlap_least"]["value"] > 0.95
    assert found["toy_a.n_subspaces"]["value"] == 2
    assert found["toy_a.gini.trained"]["value"] > found["toy_a.gini.random"]["value"]
    assert found["toy_a.distance.trained"]["value"] < found["toy_a.distance.random"]["value"]
    assert found["null.merged"]["value"] == 0
    assert found["null.gain"]["verdict"] == "holds"
    assert found["null.information"]["value"] < 0.04
    assert all(entry["verdict"] for entry in found.values())
    report = (tmp_path / "report.md").read_text()
    figures = {path.name for path in (tmp_path / "figures").glob("*.png")}
    assert figures == {"toy_a.png", "recovery.png", "training.png", "merging.png", "baselines.png"}
    assert all(f"figures/{name}" in report for name in figures)
    with actdb.open(tmp_path / "study.actdb") as db:
        stored = db.sql("SELECT run, count(*) FROM partitions GROUP BY ALL ORDER BY ALL").fetchall()
        assert stored[-1] == ("toy-a-seed0", 2)
        run = db.run("toy-a-seed0")
        tokens = run.tokens(3)
        nearest = db.nearest(
            "resid_post", layer=0, prompt=3, pos=7, k=8, metric="l2", partition="ndm", subspace=0, run=run.name
        )
        shared = [int(row["token"]) if "token" in row else -1 for row in nearest.df().to_dict("records")]
        assert len(shared) == 8
        assert len(tokens) == 128


def test_a_run_of_the_users_is_partitioned(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "x.actdb"
    store_noise(path, "noise", n_rows=2560, seed=0, width=12)
    options = ["--db", str(path), "--steps", "40", "--unit", "4", "--out", str(tmp_path / "out")]
    assert program.main(options) == 0
    found = read(tmp_path / "out")
    assert found["n_subspaces"]["value"] == 3
    assert found["merging.step_8"]["verdict"] == "end"
    assert "actdb nearest" in (tmp_path / "out" / "report.md").read_text()
    assert "no subspace is patched: give the model" in capsys.readouterr().err
    with actdb.open(path) as db:
        assert Partition.read(db, "noise", "trained").sizes == (4, 4, 4)
    assert program.main([*options, "--unit", "5"]) == 1
    assert "unit 5: it does not divide the width 12; choose one of 1, 2, 3, 4, 6, 12" in capsys.readouterr().err
    assert program.main([*options, "--layer", "3"]) == 1
    assert "--layer 3: choose one of 0" in capsys.readouterr().err


def test_a_model_of_the_users_is_harvested_partitioned_and_patched(tmp_path: Path) -> None:
    shape = {"n_layers": 2, "d_model": 8, "n_heads": 2, "d_head": 4, "d_mlp": 16, "n_ctx": 16, "d_vocab": 20}
    bridge = boot(TransformerBridgeConfig(**shape, seed=0, device="cpu", act_fn="relu", normalization_type="LN"))
    actdb.save_model(bridge, tmp_path / "model")
    generator = np.random.default_rng(0)
    prompts = [{"tokens": generator.integers(0, 20, 16).tolist()} for _ in range(40)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts))
    pairs = []
    for pair in range(4):
        labels = {"patch_pos": 3, "answer": 1, "wrong": 2}
        pairs.append({**prompts[pair], "pair": pair, "role": "clean", **labels})
        pairs.append({**prompts[pair + 4], "pair": pair, "role": "corrupted"})
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    files = ["--model", str(tmp_path / "model"), "--prompts", str(tmp_path / "prompts.jsonl")]
    options = [*files, "--pairs", str(tmp_path / "pairs.jsonl"), "--steps", "20", "--unit", "2", "--layer", "1"]
    assert program.main([*options, "--out", str(tmp_path / "out")]) == 0
    found = read(tmp_path / "out")
    names = {"trained", "pca", "pca_in_blocks", "identity", "random"}
    assert {key.split(".")[2] for key in found if key.startswith("gini.effect.")} == names
    assert {key.split(".")[2] for key in found if key.startswith("effect.best.")} == names
    assert (tmp_path / "out" / "figures" / "effects.png").exists()
