"""The program: the whole study on the hand-built model and its control, on other architectures, on stored runs."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import actdb
from analyses.semantic_head import __main__ as program
from analyses.semantic_head import planted
from analyses.semantic_head.prompt import word_prompts
from analyses.semantic_head.subject import SMALL

FEW = {"n_prompts": 4, "n_words": 63, "n_parts": 6, "n_corpus": 8, "n_texts": 4, "n_permutations": 19, "n_controls": 4}
EXTENT = replace(SMALL, **FEW, n_ranked=208, autoencoder_rows=4000)
CATEGORIES = planted.planted_categories()


def read(path: Path) -> dict[str, dict[str, Any]]:
    """Return the results of a study by key."""
    return {entry["key"]: entry for entry in json.loads((path / "results.json").read_text())["results"]}


def test_the_whole_study_finds_the_planted_answer_and_nothing_in_the_control(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("analyses.semantic_head.plan.SMALL", EXTENT)
    assert program.main(["--size", "small", "--seed", "0", "--out", str(tmp_path)]) == 0
    found = read(tmp_path)
    assert found["score.advantage"]["verdict"] == "semantic"
    assert found["scale.restored"]["verdict"] == "self-attention restored"
    assert found["community.agreement"]["verdict"] == "agrees with gold"
    assert found["symmetric.n_negative"]["verdict"] == "agrees with gold"
    assert found["ablate.mlp0"]["verdict"] == "the score rests on it"
    assert found["ablate.pos"]["verdict"] == "changes little"
    assert found["control.score.advantage"]["verdict"] == "no effect"
    assert found["control.scale.restored"]["verdict"] == "nothing was suppressed"
    assert found["control.feature.overlap"]["verdict"].startswith("no effect")
    assert all(entry["verdict"] for entry in found.values())
    figures = {path.stem for path in (tmp_path / "figures").glob("*.png")}
    assert figures == {
        *("pattern", "ranking", "ablation", "cosine", "communities", "parts"),
        *("spectrum", "scaling", "steering", "removal", "autoencoder"),
    }
    report = (tmp_path / "report.md").read_text()
    assert "It is: its score is" in report
    assert "It is not: its score is" in report
    assert all(f"figures/{name}.png" in report for name in figures)
    capsys.readouterr()
    # a second call finds every harvest done, and the database answers by itself
    with actdb.open(tmp_path / "study.actdb") as db:
        assert db.sql("SELECT count(*) FROM results").fetchone() == (len(found),)
    stored = ["--db", str(tmp_path / "study.actdb"), "--run", "hand-built-small-words"]
    arguments = [*stored, "--out", str(tmp_path / "again")]
    assert program.main([*arguments, "--all-heads"]) == 0
    again = read(tmp_path / "again")
    assert again["ranking.1"]["value"] == pytest.approx(found["ranking.1"]["value"])
    assert len([key for key in again if key.startswith("ranking.")]) == 8
    assert program.main(arguments) == 0
    assert read(tmp_path / "again")["symmetric.n_negative"]["value"] == planted.planted_place().n_negative


def test_a_head_that_is_not_there_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    actdb.save_model(planted.build_model(n_layers=1), tmp_path / "model")
    arguments = ["--model", str(tmp_path / "model"), "--size", "small", "--out", str(tmp_path / "out")]
    assert program.main([*arguments, "--layer", "0", "--head", "9"]) == 1
    assert "--layer 0 --head 9: there are layers 0 to 0, heads 0 to 3" in capsys.readouterr().err
    assert program.main([*arguments, "--layer", "0"]) == 1
    assert "--layer and --head go together" in capsys.readouterr().err
    assert program.main([*arguments, "--all-heads"]) == 0  # without tokenizer: random groups, in which nothing is found
    assert all(abs(entry["value"] - entry["null"]) < 0.3 for entry in read(tmp_path / "out").values())


def test_a_stored_run_with_raw_weights_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = word_prompts(CATEGORIES, 2, n_words=20, seed=0)
    db = tmp_path / "raw.actdb"
    actdb.harvest(planted.build_model(), prompts, out=db, run="raw", sites=("pattern",))
    with actdb.open(db, mode="a") as held:
        held.add_table("semantic_categories", CATEGORIES.table())
    assert program.main(["--db", str(db), "--out", str(tmp_path / "out")]) == 1
    assert "harvest with --processing folded" in capsys.readouterr().err
    assert program.main(["--db", str(db), "--out", str(tmp_path / "out"), "--all-heads"]) == 0


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_every_step_runs_on_other_architectures(
    kind: str, model_folder: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = replace(EXTENT, n_permutations=5, autoencoder_rows=2000)
    monkeypatch.setattr("analyses.semantic_head.plan.SMALL", few)
    monkeypatch.setattr("analyses.common.figure.save", lambda figure, path: None)  # drawn, and not rendered
    arguments = ["--model", str(model_folder(kind)), "--size", "small", "--out", str(tmp_path)]
    assert program.main([*arguments, "--layer", "1", "--head", "3"]) == 0
    found = read(tmp_path)
    assert found["score.advantage"]["verdict"] == "no effect"  # random weights
    assert ("ablate.pos" in found) == (kind == "gpt2")  # the other turns queries and keys instead
    assert found["symmetric.rank"]["value"] == 12  # 2·d_head
