"""Queries by neuron give the rows of a full scan, whichever way they are answered, and read no more than it does."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hooked import TinyModel, random_prompts
from hypothesis import given, settings
from hypothesis import strategies as st

import actdb
from actdb.cli import main
from actdb.neurons.query import Best
from actdb.schema import N_TOP

PROMPTS = random_prompts(40, longest=9)
PLAN: dict[str, Any] = {"part_tokens": 60, "batch_tokens": 30, "sites": ["mlp_post", "resid_post"]}
METRICS = ("l2", "l1", "cosine")


@pytest.fixture(scope="module", params=["float16", "float32", "precise", "last", "later", "raw"])
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Databases whose stored values tie, or are rounded, or are the last of each prompt."""
    out = tmp_path_factory.mktemp(request.param) / "x.actdb"
    options: dict[str, Any] = {
        "float32": {"store": "float32"},
        "precise": {"precision": 2},
        "last": {"positions": "last"},
        "later": {"stats": []},
        "raw": {"codec": "raw", "stats": ["heads"]},
    }.get(request.param, {})
    actdb.harvest(TinyModel(), PROMPTS, out, **PLAN, **options)
    if request.param == "later":
        with actdb.open(out, mode="a") as db:
            db.compute_statistics(["neurons"])
    return out


def scan(db: actdb.Database, site: str, layer: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rows = db.run()[site].sel(layer=layer)
    return rows.numpy().astype(np.float64), rows.prompt, rows.pos


def ranked(scores: np.ndarray, prompt: np.ndarray, pos: np.ndarray, k: int) -> list[tuple[int, int]]:
    order = np.lexsort((pos, prompt, -scores))
    order = order[~np.isnan(scores[order])][:k]
    return [(int(prompt[i]), int(pos[i])) for i in order]


def found(result: Any) -> list[tuple[int, int]]:
    return [(row["prompt_id"], row["pos"]) for row in result.df().to_dict("records")]


@given(st.integers(0, 1), st.lists(st.integers(0, 15), min_size=1, max_size=5, unique=True), st.integers(1, 30))
@settings(deadline=None, max_examples=30)
@pytest.mark.parametrize("copied", [False, True])
def test_the_highest_rows_are_those_of_a_scan(path: Path, copied: bool, layer: int, neurons: list[int], k: int) -> None:
    with actdb.open(path, mode="a") as db:
        if copied and not (path / "indexes" / "tiny" / "neurons" / f"mlp_post-{layer}.npy").exists():
            db.transpose("mlp_post", layer=layer)
        values, prompt, pos = scan(db, "mlp_post", layer)
        scores = values[:, neurons].sum(1)
        result = db.top("mlp_post", layer=layer, neurons=neurons, k=k)
        assert found(result) == ranked(scores, prompt, pos, k)
        assert np.array_equal(result.df()["value"], np.sort(scores)[::-1][:k].astype(np.float32))
        if len(neurons) == 1:
            assert found(db.top("mlp_post", layer=layer, neuron=neurons[0], k=k)) == found(result)


@given(st.integers(0, 1), st.lists(st.integers(0, 15), min_size=1, max_size=5, unique=True), st.data())
@settings(deadline=None, max_examples=30)
@pytest.mark.parametrize("copied", [False, True])
def test_the_most_similar_rows_are_those_of_a_scan(
    path: Path, copied: bool, layer: int, neurons: list[int], data: st.DataObject
) -> None:
    metric, k = data.draw(st.sampled_from(METRICS)), data.draw(st.integers(1, 20))
    with actdb.open(path, mode="a") as db:
        if copied and not (path / "indexes" / "tiny" / "neurons" / f"mlp_post-{layer}.npy").exists():
            db.transpose("mlp_post", layer=layer)
        values, prompt, pos = scan(db, "mlp_post", layer)
        row = data.draw(st.integers(0, len(values) - 1))
        group, own = values[:, neurons], values[row, neurons]
        ask: dict[str, Any] = {"layer": layer, "neurons": neurons, "k": k, "metric": metric}
        if metric == "cosine":
            if not own.any():
                with pytest.raises(actdb.SettingError, match="silent at prompt"):
                    db.most_similar("mlp_post", prompt=int(prompt[row]), pos=int(pos[row]), **ask)
                return
            with np.errstate(invalid="ignore"):
                distance = 1 - group @ own / (np.linalg.norm(group, axis=1) * np.linalg.norm(own))
        else:
            distance = np.linalg.norm(group - own, ord=2 if metric == "l2" else 1, axis=1)
        result = db.most_similar("mlp_post", prompt=int(prompt[row]), pos=int(pos[row]), **ask).df()
        places = {place: i for i, place in enumerate(zip(prompt.tolist(), pos.tolist(), strict=True))}
        chosen = [places[place] for place in zip(result["prompt_id"], result["pos"], strict=True)]
        distance[row] = np.nan
        nearest = np.sort(distance[~np.isnan(distance)])[:k]
        assert row not in chosen
        assert len(set(chosen)) == len(chosen) == len(nearest)
        assert np.allclose(result["distance"], nearest, atol=1e-6)
        assert np.allclose(distance[chosen], nearest, atol=1e-9)


def test_few_chunks_are_read(tmp_path: Path) -> None:
    """Lists: no more chunks than rows. A copy: none. Neither: those of one scan."""
    prompts = random_prompts(600, longest=32)
    run = actdb.harvest(TinyModel(d_model=256), prompts, tmp_path / "x", sites=["mlp_post"], store="float32")
    with actdb.open(tmp_path / "x", mode="a") as db:
        held = db.run()
        reader = held.source("mlp_post").reader

        def count(ask: Any) -> int:
            before = reader.n_reads
            ask()
            return reader.n_reads - before

        whole = count(lambda: held["mlp_post"].sel(layer=1).numpy())
        assert whole > 10
        assert count(lambda: db.top("mlp_post", layer=1, neuron=3, k=5)) <= N_TOP
        similar = {"layer": 1, "neurons": [3, 4], "prompt": 7, "pos": 0}
        assert whole <= count(lambda: db.most_similar("mlp_post", **similar)) <= whole + 1
        db.transpose("mlp_post", layer=1)
        assert count(lambda: db.most_similar("mlp_post", **similar)) <= 1  # the row asked about
    assert run.status == "complete"


def test_a_copy_is_a_plain_array(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("actdb.neurons.columns.BLOCK_BYTES", 700)
    actdb.harvest(TinyModel(), PROMPTS, tmp_path / "x", **PLAN)
    steps: list[tuple[int, int]] = []
    with actdb.open(tmp_path / "x", mode="a") as db:
        size = db.transpose("mlp_post", layer=1, progress=lambda done, total: steps.append((done, total)))
        blocks = [block.values for block in db.run()["mlp_post"].sel(layer=1).batches(1000)]
        copy = np.load(tmp_path / "x" / "indexes" / "tiny" / "neurons" / "mlp_post-1.npy")
        assert np.array_equal(copy, np.concatenate(blocks).T)
        assert size == copy.nbytes
        assert len(steps) > 3
        assert steps[-1] == (copy.shape[1], copy.shape[1])
        assert db.verify() == []
        db.remove("tiny")
    assert not (tmp_path / "x" / "indexes" / "tiny").exists()


def test_an_old_copy_is_not_used(tmp_path: Path) -> None:
    """A worker's half of the parts, copied; then the other half comes."""
    actdb.harvest(TinyModel(), PROMPTS, tmp_path / "x", worker=(0, 2), **PLAN)
    with actdb.open(tmp_path / "x", mode="a") as db:
        db.transpose("mlp_post", layer=0)
        actdb.harvest(TinyModel(), PROMPTS, tmp_path / "x", **PLAN)
        db.refresh()
        values, prompt, pos = scan(db, "mlp_post", 0)
        assert found(db.top("mlp_post", layer=0, neuron=2, k=50)) == ranked(values[:, 2], prompt, pos, 50)


@pytest.mark.parametrize("suffix", ["npy", "json"])
def test_a_damaged_copy_is_named(tmp_path: Path, suffix: str) -> None:
    actdb.harvest(TinyModel(), PROMPTS, tmp_path / "x", **PLAN)
    with actdb.open(tmp_path / "x", mode="a") as db:
        db.transpose("mlp_post", layer=0)
        file = tmp_path / "x" / "indexes" / "tiny" / "neurons" / f"mlp_post-0.{suffix}"
        content = bytearray(file.read_bytes())
        content[-3] ^= 1
        file.write_bytes(content)
        with pytest.raises(actdb.DamageError, match="mlp_post-0"):
            db.top("mlp_post", layer=0, neurons=range(16), k=30)
        assert [damage.path for damage in db.verify()] == ["indexes/tiny/neurons/mlp_post-0.npy"]
        db.transpose("mlp_post", layer=0)
        assert db.verify() == []


def test_bad_input_says_what_there_is(tmp_path: Path) -> None:
    actdb.harvest(TinyModel(), PROMPTS, tmp_path / "x", sites=["mlp_post", "z"])
    with actdb.open(tmp_path / "x") as db:
        rows = db.run()["mlp_post"].sel(layer=0).n_rows
        for given, error, message in (
            ({"layer": 0, "neuron": 16}, actdb.SelectionError, "mlp_post has neurons 0 to 15"),
            ({"layer": 2, "neuron": 1}, actdb.SelectionError, "layer 2"),
            ({"neuron": 1}, actdb.SelectionError, "a site of rows without heads and a layer"),
            ({"layer": 0, "neurons": []}, actdb.SelectionError, "holds no neuron"),
            ({"layer": 0, "neurons": [1, 1]}, actdb.SelectionError, "named twice"),
            ({"layer": 0}, actdb.SettingError, "neuron= or neurons="),
            ({"layer": 0, "neuron": 1, "k": 0}, actdb.SettingError, "at least 1"),
            ({"layer": 0, "neuron": 1, "k": rows + 1}, actdb.SettingError, f"there are {rows} rows"),
        ):
            with pytest.raises(error, match=message):
                db.top("mlp_post", **given)
        with pytest.raises(actdb.SelectionError, match="without heads"):
            db.top("z", layer=0, neuron=1)
        with pytest.raises(actdb.SettingError, match="metric 'dot': choose one of l2, l1, cosine"):
            db.most_similar("mlp_post", layer=0, neurons=[1], prompt=0, pos=0, metric="dot")
        with pytest.raises(actdb.SelectionError, match="prompt 99"):
            db.most_similar("mlp_post", layer=0, neurons=[1], prompt=99, pos=0)
        with pytest.raises(actdb.WriteError, match="mode='a' to add a copy"):
            db.transpose("mlp_post", layer=0)


def test_the_command_shows_tokens_in_context(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "x")
    actdb.harvest(TinyModel(), [{"tokens": [1, 2, 3], "kind": "a"}, {"tokens": [2, 5], "kind": "b"}], out)
    for arguments in (["top", out, "mlp_post", "--layer", "0", "--neuron", "1", "-k", "5"], ["transpose", out]):
        with pytest.raises(SystemExit) as exit:
            main([*arguments, *(["mlp_post", "--layer", "0"] if arguments[0] == "transpose" else [])])
        assert exit.value.code == 0
    text = capsys.readouterr()
    assert text.out.splitlines()[0] == "run,rank,prompt_id,pos,value,token,context,kind"
    assert len(text.out.splitlines()) == 6
    assert "[2]" in text.out
    with pytest.raises(SystemExit):
        main(["top", out, "mlp_post", "--layer", "0", "--neuron", "1,2", "--like", "0", "-1", "-k", "2"])
    assert capsys.readouterr().out.splitlines()[0] == "run,rank,prompt_id,pos,distance,token,context,kind"


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=40), st.integers(1, 9), st.integers(1, 7))
def test_the_best_do_not_depend_on_the_cut(scores: list[int], k: int, size: int) -> None:
    values, prompt = np.array(scores, np.float64), np.arange(len(scores))
    best = Best(k)
    for begin in range(0, len(scores), size):
        rows = slice(begin, begin + size)
        best.offer(values[rows], prompt[rows], np.zeros_like(prompt[rows]))
    assert [(p, 0) for p in best.prompt.tolist()] == ranked(values, prompt, np.zeros_like(prompt), k)
    assert torch.equal(torch.tensor(best.scores), torch.tensor(np.sort(values)[::-1][:k].copy()))
