"""The forward-proportion study as a command: on its own small model, and on a run that is there already."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

import actdb
from analyses.forward_proportion import finding, own, planted
from analyses.forward_proportion.__main__ import main

FEW = replace(
    finding.SMALL,
    n_seeds=3,
    n_null=3,
    n_bootstraps=3,
    n_repeats=1,
    n_resamples=20,
    n_permutations=10,
    n_pairs=2,
    n_perturbed=6,
    n_layers=2,
    k=3,
    n_state_pairs=120,
    n_patched=6,
    n_ring_null=4,
)
STEPS = {"communities", "predict", "rewiring", "state", "ring"}
FIGURES = {"communities", "modularity", "accuracy", "rewiring", "divergence", "sweep", "rings"}


def results(out: Path) -> dict[str, dict[str, object]]:
    found = json.loads((out / "results.json").read_text())
    assert found["analysis"] == "forward_proportion"
    return {entry["key"]: entry for entry in found["results"]}


def test_the_study_of_its_own_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finding, "SMALL", FEW)
    monkeypatch.setitem(own.N_STEPS, "small", 10)
    out = tmp_path / "out"
    assert main(["--size", "small", "--out", str(out), "--seed", "3"]) == 0
    found = results(out)
    assert {key.partition(".")[0] for key in found} == STEPS | {"perturb", "patch"}
    assert found["patch.L3.random"]["value"] == pytest.approx(1, abs=0.02)  # stored in half precision
    assert found["predict.interactions"]["claimed"] == pytest.approx(55 / 60)
    assert all(entry["verdict"] for entry in found.values())
    assert {path.stem for path in (out / "figures").glob("*.png")} == FIGURES | {"perturbation", "patching"}
    report = (out / "report.md").read_text()
    assert "is two prompts" in report
    assert "figures/rings.png" in report
    with actdb.open(out / "study.actdb") as db:
        assert db.run().sites == ("resid_post", "z", "pattern", "interaction", "last_state")
        (n,) = db.sql("SELECT count(*) FROM results WHERE analysis = 'forward_proportion'").fetchone()  # type: ignore[misc]
        assert n == len(found)
        assert db.verify() == []


def test_the_study_of_a_run_without_its_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(finding, "SMALL", FEW)
    path, out = tmp_path / "x.actdb", tmp_path / "out"
    planted.harvest(planted.build_reader(rewires=True), planted.reader_prompts(n=40), path, run="reader")
    options = ["--db", str(path), "--size", "small", "--out", str(out)]
    assert main(options) == 0
    assert capsys.readouterr().out.startswith("key ")
    found = results(out)
    assert {key.partition(".")[0] for key in found} == STEPS
    assert float(str(found["rewiring.ratio"]["value"])) > 1.2
    assert "needs the model" not in (out / "report.md").read_text()
    assert "need the model: give it with --weights" in (out / "report.md").read_text()
    first = (out / "results.json").read_bytes()
    assert main(options) == 0  # what was added is used again
    assert (out / "results.json").read_bytes() == first
    assert main([*options, "--label", "kind"]) == 1
    assert "have no label 'kind'; their labels: category" in capsys.readouterr().err
