"""Modular arithmetic end to end: the small study, its verification, and models given by file or database."""

import json
from pathlib import Path

import pytest
import torch

import actdb
from analyses.modular_arithmetic import __main__ as program
from analyses.modular_arithmetic import model, plan
from analyses.modular_arithmetic.verification import compare

ANALYSIS = "modular_arithmetic"


@pytest.fixture(scope="module")
def studied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished small study."""
    out = tmp_path_factory.mktemp("study")
    assert program.main(["--size", "small", "--out", str(out)]) == 0
    return out


def test_the_study_writes_claims_figures_and_tables(studied: Path) -> None:
    results = json.loads((studied / "results.json").read_text())
    keys = [entry["key"] for entry in results["results"]]
    assert len(keys) == len(set(keys))
    wanted = {"main.fourier.key_share", "main.loss.restricted", "main.mean.embed", "memorising.loss.excluded"}
    assert wanted | {"untrained.fourier.n_keys"} <= set(keys)
    for prefix in ("main.path", "main.circuit", "topology", "comparison", "pooled.mean"):
        assert any(key.startswith(prefix) for key in keys), prefix
    assert all(entry["verdict"] for entry in results["results"])
    text = (studied / "report.md").read_text()
    for line in text.splitlines():
        if line.startswith("!["):
            assert (studied / line.rpartition("(")[2].rstrip(")")).stat().st_size > 5000
    for heading in ("Does it grok?", "What the original claims"):
        assert f"## {heading}" in text
    with actdb.open(studied / "study.actdb") as db:
        n = db.sql("SELECT count(*) FROM results WHERE analysis = ?", [ANALYSIS]).fetchone()
        assert n == (len(keys),)
        steps = db.sql("SELECT count(DISTINCT step) FROM modular_progress WHERE run LIKE 'one-layer-%'").fetchone()
        main = plan.SMALL
        assert steps is not None
        assert steps[0] == len(db.sql("SELECT run FROM runs WHERE run LIKE 'one-layer-%'").fetchall())
        assert main["n_epochs"] in {run.step for run in db.runs()}


def test_a_finished_study_is_verified_and_a_changed_claim_fails(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["--size", "small", "--modulus", "7", "--architecture", "hybrid", "--epochs", "20", "--out", str(tmp_path)]
    assert program.main(asked) == 0
    assert program.main([*asked, "--verify"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert not [line for line in lines if line.startswith("FAIL")]
    with actdb.open(tmp_path / "study.actdb", mode="a") as db:
        rows = db.sql("SELECT * FROM results WHERE analysis = ?", [ANALYSIS]).arrow().to_pylist()
        values = {row["key"]: {k: v for k, v in row.items() if k not in ("analysis", "run", "key")} for row in rows}
        values["model.fourier.gini"]["value"] += 0.05
        db.add_results(ANALYSIS, rows[0]["run"], values=values)
    assert program.main([*asked, "--verify"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines if line.startswith("FAIL")] == ["model.fourier.gini"]
    assert lines[-1] == f"{len(values) - 1} of {len(values)} claims pass"


def test_without_a_study_there_is_nothing_to_verify(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert program.main(["--verify", "--size", "small", "--out", str(tmp_path)]) == 1
    assert "leave --verify out" in capsys.readouterr().err


def test_weights_from_a_file_are_studied(tmp_path: Path) -> None:
    made = model.build(model.shape_of("one-layer", d_model=16, d_mlp=24), 7, seed=0)
    torch.save(made.state_dict(), tmp_path / "given.pt")
    out = tmp_path / "out"
    assert program.main(["--size", "small", "--model", str(tmp_path / "given.pt"), "--out", str(out)]) == 0
    results = {entry["key"]: entry for entry in json.loads((out / "results.json").read_text())["results"]}
    assert results["model.accuracy.train"]["value"] < 0.6  # random weights
    assert "model.circuit.accuracy" in results or any(key.startswith("model.circuit") for key in results)
    assert program.main(["--size", "small", "--db", str(out / "study.actdb"), "--out", str(tmp_path / "again")]) == 0
    again = {e["key"]: e for e in json.loads((tmp_path / "again" / "results.json").read_text())["results"]}
    assert again["model.loss.all"]["value"] == pytest.approx(results["model.loss.all"]["value"])


def test_a_training_by_command_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = ["--size", "small", "--modulus", "7", "--every", "10", "--out", str(tmp_path)]
    assert program.main([*base, "--architecture", "lookup", "--epochs", "10"]) == 0
    assert program.main([*base, "--architecture", "lookup", "--epochs", "20"]) == 0
    with actdb.open(tmp_path / "study.actdb") as db:
        assert sorted(run.step for run in db.runs()) == [0, 10, 20]
    assert program.main([*base, "--architecture", "lookup", "--epochs", "20", "--train-share", "0.5"]) == 1
    assert "train_share differ" in capsys.readouterr().err


def test_checks_tell_missing_and_changed_claims() -> None:
    from analyses.common.report import Claim

    stored = {
        "same": {"value": 1.0, "verdict": "measured"},
        "verdict": {"value": 1.0, "verdict": "above chance"},
        "gone": {"value": 2.0, "verdict": "measured"},
        "nothing": {"value": None, "verdict": "not measurable"},
    }
    claims = [
        Claim("same", 1.0 + 1e-5, verdict="measured"),
        Claim("verdict", 1.0, verdict="no effect"),
        Claim("nothing", float("nan"), verdict="not measurable"),
        Claim("new", 3.0, verdict="measured"),
    ]
    passed = {check.key: check.passed for check in compare(stored, claims)}
    assert passed == {"same": True, "verdict": False, "gone": False, "nothing": True, "new": False}
