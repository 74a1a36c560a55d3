"""Lens statistics against NumPy, and statistics computed from stored arrays against those of the harvest."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hooked import TinyModel, random_prompts

import actdb
from actdb.harvesting import replay
from actdb.storage.commits import statistics_name, table_name

ALL = ["heads", "neurons", "tokens", "lens"]
PROMPTS = [*random_prompts(14, d_vocab=6, longest=9), {"tokens": [3]}]
PLAN: dict[str, Any] = {"store": "float32", "part_tokens": 40, "batch_tokens": 24}
TABLES = {
    "head_stats": "prompt_id, layer, head",
    "neuron_stats": "layer, neuron",
    "neuron_top": "layer, neuron, rank",
    "token_stats": "prompt_id, pos",
    "lens_stats": "prompt_id, layer, pos",
    "head_attribution": "prompt_id, layer, head",
}


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(-1, keepdims=True)))


class Oracle:
    """The final norm and unembedding of a run in float64, written anew."""

    def __init__(self, run: actdb.Run) -> None:
        names = run.weight_names()
        self.kind = str(run.info.model["normalization"])
        self.eps = float(run.info.model["norm_eps"] or 0)
        self.w_u = run.weight("W_U").astype(np.float64)
        self.w = run.weight("ln_final.w").astype(np.float64) if "ln_final.w" in names else 1.0
        self.b = run.weight("ln_final.b").astype(np.float64) if "ln_final.b" in names else 0.0
        self.b_u = run.weight("unembed.b_U").astype(np.float64) if "unembed.b_U" in names else 0.0

    def centre(self, x: np.ndarray) -> np.ndarray:
        return x - x.mean(-1, keepdims=True) if self.kind.startswith("LN") else x

    def sigma(self, x: np.ndarray) -> np.ndarray:
        if not self.kind.startswith(("LN", "RMS")):
            return np.ones((*x.shape[:-1], 1))
        return np.asarray(np.sqrt((self.centre(x) ** 2).mean(-1, keepdims=True) + self.eps))

    def logits(self, x: np.ndarray) -> np.ndarray:
        return np.asarray(self.centre(x) / self.sigma(x) * self.w + self.b) @ self.w_u + self.b_u

    def attribution(self, written: np.ndarray, final: np.ndarray, tokens: np.ndarray) -> float:
        """By the logits themselves: those that the part written alone gives through the norm with its size held."""
        linear = (self.centre(written) / self.sigma(final) * self.w) @ self.w_u
        own = linear[np.arange(len(tokens) - 1), tokens[1:]] - linear[:-1].mean(-1)
        return float(own.mean())


@pytest.mark.parametrize(
    ("kind", "options"),
    [("gpt2", {}), ("gpt2", {"processing": "folded"}), ("llama", {}), ("native-mlp", {}), ("native-attn", {})],
)
def test_the_lens_equals_numpy(
    model_folder: Callable[[str], Path], tmp_path: Path, kind: str, options: dict[str, Any]
) -> None:
    sites = ["resid_post", "z", "logits"]
    run = actdb.harvest(model_folder(kind), PROMPTS, tmp_path / "x", sites=sites, stats=ALL[3:], **PLAN, **options)
    oracle = Oracle(run)
    with actdb.open(tmp_path / "x") as db:
        lens = db.sql("SELECT * EXCLUDE (run) FROM lens_stats ORDER BY prompt_id, layer, pos").fetchall()
        heads = db.sql("SELECT * EXCLUDE (run) FROM head_attribution ORDER BY prompt_id, layer, head").fetchall()
    places = iter(lens)
    for prompt in range(len(PROMPTS)):
        tokens = run.tokens(prompt)
        final = log_softmax(run["logits"].sel(prompt=prompt).numpy().astype(np.float64))
        for layer in range(2):
            logits = oracle.logits(run["resid_post"].sel(prompt=prompt, layer=layer).numpy().astype(np.float64))
            log_p = log_softmax(logits)
            for pos in range(len(tokens)):
                row = next(places)
                assert row[:3] == (prompt, layer, pos)
                kl = float((np.exp(final[pos]) * (final[pos] - log_p[pos])).sum())
                assert row[3] == pytest.approx(kl, abs=2e-5)
                assert row[5] == pytest.approx(-float((np.exp(log_p[pos]) * log_p[pos]).sum()), abs=2e-5)
                assert row[7] == int(log_p[pos].argmax())
                assert row[8] == pytest.approx(float(np.exp(log_p[pos].max())), abs=2e-5)
                if pos + 1 < len(tokens):
                    assert row[4] == pytest.approx(-log_p[pos, tokens[pos + 1]], abs=2e-5)
                    assert row[6] == int((logits[pos] > logits[pos, tokens[pos + 1]]).sum())
                else:
                    assert (row[4], row[6]) == (None, None)
    assert next(places, None) is None
    assert max(row[3] for row in lens) > 0.01  # the layers differ, so that the figures mean something
    for prompt, layer, head, value in heads:
        tokens = run.tokens(prompt)
        z = run["z"].sel(prompt=prompt, layer=layer, head=head).numpy().astype(np.float64)
        written = z @ run.weight("W_O", layer=layer, head=head).astype(np.float64)
        final = run["resid_post"].sel(prompt=prompt, layer=1).numpy().astype(np.float64)
        if len(tokens) > 1:
            assert value == pytest.approx(oracle.attribution(written, final, tokens), rel=1e-4, abs=1e-5)
        else:
            assert value is None
    assert len(heads) == len(PROMPTS) * 2 * run.info.model["n_heads"]


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_stored_arrays_give_the_figures_of_the_harvest(
    model_folder: Callable[[str], Path], tmp_path: Path, kind: str
) -> None:
    """In float32 to rounding; neurons, whose values are stored as computed, exactly in rank and place."""
    actdb.harvest(model_folder(kind), PROMPTS, tmp_path / "x", stats=ALL, **PLAN)
    actdb.harvest(model_folder(kind), PROMPTS, tmp_path / "y", stats=[], **PLAN)
    with actdb.open(tmp_path / "x") as harvested, actdb.open(tmp_path / "y", mode="a") as stored:
        assert stored.sql("SELECT count(*) FROM head_stats").fetchone() == (0,)  # the catalog grows, not anew
        assert stored.compute_statistics(["lens"]) == ["lens"]
        assert stored.compute_statistics(ALL) == ALL[:3]
        for table, keys in TABLES.items():
            query = f"SELECT * EXCLUDE (run) FROM {table} ORDER BY {keys}"
            wanted, found = harvested.sql(query).df(), stored.sql(query).df()
            assert len(wanted) == len(found) > 0
            for name in wanted.columns:
                a, b = wanted[name].to_numpy(float), found[name].to_numpy(float)
                assert np.allclose(a, b, rtol=1e-4, atol=2e-5, equal_nan=True), (table, name)
                assert table == "neuron_stats" or not np.isnan(a).all(), (table, name)
        query = "SELECT statistic, computed_from FROM statistics ORDER BY ALL"
        assert harvested.sql(query).fetchall() == [(name, "activations") for name in sorted(ALL)]
        assert stored.sql(query).fetchall() == [(name, "stored") for name in sorted(ALL)]
        assert stored.verify() == []
        assert stored.compute_statistics(ALL) == []
        assert harvested.sql("SELECT statistic FROM statistics").fetchall()


def test_squares_of_models_that_look_both_ways(model_folder: Callable[[str], Path], tmp_path: Path) -> None:
    actdb.harvest(model_folder("bert"), PROMPTS, tmp_path / "x", stats=["heads"], **PLAN)
    actdb.harvest(model_folder("bert"), PROMPTS, tmp_path / "y", stats=[], **PLAN)
    query = "SELECT * EXCLUDE (run) FROM head_stats ORDER BY prompt_id, layer, head"
    with actdb.open(tmp_path / "x") as harvested, actdb.open(tmp_path / "y", mode="a") as stored:
        stored.compute_statistics(["heads"])
        wanted, found = harvested.sql(query).df().astype(float), stored.sql(query).df().astype(float)
        assert np.allclose(wanted, found, atol=1e-5, equal_nan=True)
        with pytest.raises(actdb.SettingError, match="looks both ways"):
            stored.compute_statistics(["lens"])


def test_rounded_arrays_agree_to_their_precision(model_folder: Callable[[str], Path], tmp_path: Path) -> None:
    plan = {**PLAN, "store": "float16"}
    actdb.harvest(model_folder("gpt2"), PROMPTS, tmp_path / "x", stats=ALL, **plan)
    actdb.harvest(model_folder("gpt2"), PROMPTS, tmp_path / "y", stats=[], **plan)
    with actdb.open(tmp_path / "x") as harvested, actdb.open(tmp_path / "y", mode="a") as stored:
        stored.compute_statistics(ALL)
        for query in (
            "SELECT entropy, induction_mass, result_norm, direct_logit_attribution FROM head_stats ORDER BY ALL",
            "SELECT kl, loss, entropy FROM lens_stats ORDER BY prompt_id, layer, pos",
            "SELECT mean, std, max FROM neuron_stats ORDER BY layer, neuron",
        ):
            wanted, found = harvested.sql(query).df().to_numpy(float), stored.sql(query).df().to_numpy(float)
            assert np.allclose(wanted, found, rtol=5e-3, atol=5e-3, equal_nan=True)
            assert not np.array_equal(wanted, found, equal_nan=True)


def test_an_interrupted_computation_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = actdb.harvest(TinyModel(), PROMPTS, tmp_path / "x", stats=[], **PLAN)
    assert run.info.n_parts > 1
    done: list[int] = []
    compute = replay._compute_part

    def stop_in_the_second(folder: Any, held: Any, part: int, names: Any) -> None:
        if len(done) == 1:
            raise KeyboardInterrupt
        compute(folder, held, part, names)
        done.append(part)

    monkeypatch.setattr(replay, "_compute_part", stop_in_the_second)
    with actdb.open(tmp_path / "x", mode="a") as db:
        with pytest.raises(KeyboardInterrupt):
            db.compute_statistics(["heads"])
        db.refresh()
        assert db.sql("SELECT n_parts FROM statistics").fetchall() == [(1,)]
        monkeypatch.setattr(replay, "_compute_part", lambda *given: (compute(*given), done.append(given[2])))
        db.compute_statistics(["heads"])
        assert sorted(done) == list(range(run.info.n_parts))
        assert db.sql("SELECT count(DISTINCT prompt_id) FROM head_stats").fetchone() == (len(PROMPTS),)


@pytest.mark.parametrize("target", ["table", "commit"])
def test_damaged_statistics_are_named_and_computed_anew(tmp_path: Path, target: str) -> None:
    run = actdb.harvest(TinyModel(), PROMPTS, tmp_path / "x", stats=[], **PLAN)
    with actdb.open(tmp_path / "x", mode="a") as db:
        db.compute_statistics(["heads"])
        name = table_name(run.name, 1, "head_stats") if target == "table" else statistics_name(run.name, 1, "heads")
        content = bytearray((tmp_path / "x" / name).read_bytes())
        content[len(content) // 2] ^= 1
        (tmp_path / "x" / name).write_bytes(content)
        assert [damage.path for damage in db.verify()] == [name]
        assert db.compute_statistics(["heads"]) == ["heads"]
        assert db.verify() == []


def test_what_is_not_stored_is_named(model_folder: Callable[[str], Path], tmp_path: Path) -> None:
    folder = model_folder("gpt2")
    actdb.harvest(folder, PROMPTS, tmp_path / "x", run="z", sites=["z"], stats=[])
    actdb.harvest(folder, PROMPTS, tmp_path / "x", run="first", sites=["resid_post"], layers=[0], stats=[])
    actdb.harvest(folder, PROMPTS, tmp_path / "x", run="last", positions="last", stats=[])
    with actdb.open(tmp_path / "x", mode="a") as db:
        with pytest.raises(actdb.SettingError, match="heads needs site pattern, .* --sites z,pattern or with --stats"):
            db.compute_statistics(["heads"], run="z")
        with pytest.raises(actdb.SettingError, match="tokens reads predictions from resid_post of the last layer"):
            db.compute_statistics(["tokens"], run="first")
        with pytest.raises(actdb.SettingError, match="stores the last position alone"):
            db.compute_statistics(["heads"], run="last")
        with pytest.raises(actdb.SettingError, match="--stats speed: choose one of heads, neurons, tokens, lens"):
            db.compute_statistics(["speed"], run="z")
    with actdb.open(tmp_path / "x") as db, pytest.raises(actdb.WriteError, match="mode='a' to compute statistics"):
        db.compute_statistics(["heads"], run="last")


def test_a_model_that_caps_its_logits_is_refused(model_folder: Callable[[str], Path], tmp_path: Path) -> None:
    from actdb.harvesting import trial

    with pytest.MonkeyPatch.context() as patch:
        readout = trial.model_readout

        def doubled(model: Any) -> Any:
            found = readout(model)
            return None if found is None else type(found)(**{**found.__dict__, "matrix": found.matrix * 2})

        patch.setattr(trial, "model_readout", doubled)
        with pytest.raises(actdb.SettingError, match=r"not norm\(resid_post\) W_U \+ b_U"):
            actdb.harvest(model_folder("gpt2"), PROMPTS, tmp_path / "x", stats=["lens"])
    with pytest.raises(actdb.SettingError, match="--stats lens: this model shows no resid_post"):
        actdb.harvest(TinyModel(), PROMPTS, tmp_path / "y", stats=["lens"])
