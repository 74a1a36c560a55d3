"""The command line: what each command prints, and one line for each bad input."""

import json
from pathlib import Path

import numpy as np
import pytest
from hooked import random_prompts

import actdb
from actdb.cli import main


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a native model, prompts and a database made by the command."""
    from transformer_lens.config import TransformerBridgeConfig
    from transformer_lens.model_bridge import TransformerBridge

    folder = tmp_path_factory.mktemp("cli")
    cfg = TransformerBridgeConfig(
        n_layers=2, d_model=8, n_heads=2, d_head=4, d_vocab=16, n_ctx=32, attn_only=True, seed=0, act_fn="relu"
    )
    actdb.save_model(TransformerBridge.boot_native(cfg), folder / "model")
    lines = "".join(json.dumps(prompt) + "\n" for prompt in random_prompts(9))
    (folder / "prompts.jsonl").write_text(lines)
    assert run("harvest", folder / "model", folder / "prompts.jsonl", "-o", folder / "x.actdb") == 0
    return folder


def run(*arguments: object) -> int:
    """Run a command and return its exit code."""
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    return int(stop.value.code or 0)


def test_each_command(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    database = place / "x.actdb"
    assert run("info", database, "--format", "json") == 0
    (row,) = json.loads(capfd.readouterr().out)
    assert (row["run"], row["status"], row["prompts"]) == ("model", "complete", 9)
    assert run("sites", database) == 0
    assert [line.split(",")[0] for line in capfd.readouterr().out.splitlines()] == [
        "site",
        "resid_post",
        "z",
        "pattern",
    ]
    assert run("sql", database, "SELECT count(*) AS n FROM prompts") == 0
    assert capfd.readouterr().out == "n\n9\n"
    assert run("sql", database, "--schema") == 0
    assert "head_stats" in capfd.readouterr().out
    assert run("slice", database, "z", "--layer", 1, "--where", "kind = 'a'", "--pos", -1, "-o", place / "z.npy") == 0
    with actdb.open(database) as db:
        wanted = db.run()["z"].sel(layer=1, where="kind = 'a'", pos=-1).numpy()
    assert np.array_equal(np.load(place / "z.npy"), wanted)
    assert run("verify", database) == 0
    assert "every byte matches" in capfd.readouterr().err


def test_a_dry_run_writes_nothing(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run("harvest", place / "model", place / "prompts.jsonl", "-o", place / "dry.actdb", "--dry-run") == 0
    out = capfd.readouterr().out
    assert "rows" in out
    assert "free" in out
    assert not (place / "dry.actdb").exists()


def test_damage_is_named_and_repaired(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    harvest = ("harvest", place / "model", place / "prompts.jsonl", "-o", place / "d.actdb")
    assert run(*harvest) == 0
    next((place / "d.actdb").rglob("*.head_stats.parquet")).unlink()
    assert run("verify", place / "d.actdb") == 1
    assert "head_stats.parquet is missing (run model, part 0)" in capfd.readouterr().out
    assert run(*harvest) == 0
    assert run("verify", place / "d.actdb") == 0
    assert run("rm", place / "d.actdb", "--run", "model") == 0
    assert actdb.open(place / "d.actdb").runs() == []


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("info", "nowhere"), 1, "not an actdb database"),
        (("slice", "x.actdb", "zz"), 1, "no site 'zz'; it holds resid_post, z, pattern"),
        (("slice", "x.actdb", "z", "--layer", "9"), 1, "layers 0 to 1"),
        (("slice", "x.actdb", "z", "--head", "9"), 1, "heads 0 to 1"),
        (("slice", "x.actdb", "z", "--prompt", "99"), 1, "prompts 0 to 8"),
        (("slice", "x.actdb", "z", "--prompt", "a"), 2, "is not an index"),
        (("slice", "x.actdb", "z", "-o", "z.txt"), 1, ".npy, .npz, .safetensors"),
        (("harvest", "model", "prompts.jsonl", "-o", "x.actdb", "--store", "float32"), 1, "--run"),
        (("harvest", "model", "prompts.jsonl", "-o", "n.actdb", "--run", "a/b"), 1, "is not usable"),
        (("harvest", "model", "prompts.jsonl", "-o", "n.actdb", "--sites", "zz"), 1, "available: "),
        (("harvest", "model", "missing.jsonl", "-o", "n.actdb"), 1, "no such prompts file"),
        (("harvest", "model", "prompts.jsonl", "-o", "n.actdb", "--codec", "zip"), 1, "lz4, raw"),
        (("harvest", "./none", "prompts.jsonl", "-o", "n.actdb"), 1, "model"),
        (("sql", "x.actdb", "SELECT nope FROM prompts"), 1, "nope"),
        (("sql", "x.actdb", "DROP TABLE prompts"), 1, "only reads"),
        (("sql", "x.actdb", "COPY prompts TO 'stolen.csv'"), 1, "only reads"),
        (("sql", "x.actdb", "SELECT * FROM read_csv('/etc/hostname')"), 1, "actdb: "),
        (("sql", "x.actdb", "SELECT 1", "--format", "xml"), 2, "xml"),
        (("rm", "x.actdb", "--run", "nope"), 1, "no run 'nope'"),
        (("unknown",), 2, "No such command"),
    ],
)
def test_bad_input_is_one_line(
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    code: int,
    message: str,
) -> None:
    monkeypatch.chdir(place)
    before = sorted(path.name for path in place.iterdir())
    assert run(*arguments) == code
    captured = capfd.readouterr()
    assert captured.out == ""
    assert message in captured.err
    assert "Traceback" not in captured.err
    if code == 1:
        assert [line for line in captured.err.splitlines() if line.startswith("actdb: ")] == captured.err.splitlines()[
            -1:
        ]
    assert sorted(path.name for path in place.iterdir()) == before


def test_the_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    assert run("demo") == 0
    rows = [line.split() for line in capfd.readouterr().out.splitlines()[2:]]
    assert len(rows) == 8
    assert float(rows[0][2]) > 0.8  # the first row is the previous-token head
    assert max(float(row[3]) for row in rows if row[0] == "1") > 0.8
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")
