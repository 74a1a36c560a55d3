"""The analyses' toolkit, held to scipy, statsmodels, transformer-lens and plain NumPy."""

import ast
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import statsmodels.formula.api as smf
import torch
from hooked import TinyModel, random_prompts
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from scipy.spatial.distance import jensenshannon
from statsmodels.stats.anova import anova_lm

import actdb
from analyses import common
from analyses.common import figure, metric, program, report, significance
from analyses.common.lens import logit_lens
from analyses.common.selectivity import CellSums, sum_cells


def sums_of(values: Any, cells: Any, n_cells: int, *, split: int = 3) -> CellSums:
    """Sums of values [row, neuron], added in pieces."""
    sums = CellSums(n_cells)
    for piece in np.array_split(np.arange(len(cells)), split):
        sums.add(values[None, piece], cells[piece])
    return sums


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    n_rows=st.integers(12, 200),
    n_groups=st.integers(2, 6),
    offset=st.sampled_from([0.0, 5.0, -300.0]),
    dtype=st.sampled_from([np.float16, np.float32]),
)
def test_one_way_is_scipys(seed: int, n_rows: int, n_groups: int, offset: float, dtype: Any) -> None:
    generator = np.random.default_rng(seed)
    groups = np.concatenate([np.arange(n_groups).repeat(2), generator.integers(0, n_groups, n_rows)])
    values = (generator.standard_normal((len(groups), 5)) + 0.5 * groups[:, None] + offset).astype(dtype)
    found = sums_of(values, groups, n_groups + 1).one_way()  # the last group stays empty

    wide = values.astype(np.float64)
    expected = stats.f_oneway(*(wide[groups == group] for group in range(n_groups)))
    between = sum((groups == g).sum() * (wide[groups == g].mean(0) - wide.mean(0)) ** 2 for g in range(n_groups))
    total = ((wide - wide.mean(0)) ** 2).sum(0)
    within = (total - between) / (len(groups) - n_groups)
    np.testing.assert_allclose(found.f[0], expected.statistic, rtol=1e-3)
    np.testing.assert_allclose(found.p[0], expected.pvalue, rtol=1e-2, atol=1e-12)
    np.testing.assert_allclose(found.eta_squared[0], between / total, rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(
        found.omega_squared[0], (between - (n_groups - 1) * within) / (total + within), rtol=1e-3, atol=1e-4
    )


def test_rows_left_out_do_not_count() -> None:
    generator = np.random.default_rng(0)
    values, groups = generator.standard_normal((300, 4)).astype(np.float32), generator.integers(-1, 3, 300)
    kept = groups >= 0
    found = sums_of(values, groups, 3).one_way()
    expected = sums_of(values[kept], groups[kept], 3).one_way()
    np.testing.assert_allclose(found.f, expected.f, rtol=1e-5)
    assert (found.df_effect, found.df_error) == (2, kept.sum() - 3)


def test_a_neuron_that_never_varies_is_not_selective() -> None:
    values = np.zeros((100, 2), np.float32)
    values[:, 1] = np.random.default_rng(0).standard_normal(100)
    found = sums_of(values, np.arange(100) % 4, 4).one_way()
    assert np.isnan(found.f[0, 0])
    assert found.eta_squared[0, 0] == found.omega_squared[0, 0] == 0
    assert not significance.significant(found.p[0])[0]


def test_two_way_is_statsmodels_type_two_of_unequal_cells() -> None:
    generator = np.random.default_rng(1)
    first, second = generator.integers(0, 4, 400), generator.choice(3, 400, p=(0.6, 0.3, 0.1))
    values = generator.standard_normal((400, 3)) + first[:, None] * 0.3 + (first * second)[:, None] * (0, 0.2, 0.4)
    found = sums_of(values.astype(np.float32), first * 3 + second, 12).two_way((4, 3))
    for neuron in range(3):
        data = pd.DataFrame({"y": values[:, neuron], "a": first, "b": second})
        table = anova_lm(smf.ols("y ~ C(a) * C(b)", data).fit(), typ=2)
        total = ((values[:, neuron] - values[:, neuron].mean()) ** 2).sum()
        effects = (found.first, found.second, found.interaction)
        for name, effect in zip(("C(a)", "C(b)", "C(a):C(b)"), effects, strict=True):
            assert effect.f[0, neuron] == pytest.approx(table.loc[name, "F"], rel=1e-3)
            assert effect.eta_squared[0, neuron] == pytest.approx(table.loc[name, "sum_sq"] / total, rel=1e-3)
            assert effect.df_effect == table.loc[name, "df"]


def test_sums_of_stored_rows_do_not_depend_on_the_block(tmp_path: Path) -> None:
    run = actdb.harvest(TinyModel(), random_prompts(40), out=tmp_path / "x.actdb", store="float32")
    ids = [run.tokens(prompt) for prompt in range(run.n_prompts)]
    starts = np.cumsum([0, *map(len, ids)])
    flat = np.concatenate(ids).astype(np.int64)
    values = np.moveaxis(run["mlp_post"].numpy(), 0, -1)  # [row, neuron, layer]
    for n_rows in (1, 7, None):
        sums = sum_cells(run["mlp_post"], lambda p, q: flat[starts[p] + q], n_cells=16, n_rows=n_rows)
        means = sums.means()  # [layer, token, neuron]
        for token in np.unique(flat):
            np.testing.assert_allclose(means[:, token].T, values[flat == token].mean(0), rtol=1e-4, atol=1e-5)


def test_divergences_are_scipys() -> None:
    generator = np.random.default_rng(0)
    a, b = generator.standard_normal((2, 6, 9)) * 5
    p, q = (torch.softmax(torch.from_numpy(x), -1).numpy() for x in (a, b))
    np.testing.assert_allclose(metric.kl_divergence(a, b), stats.entropy(p, q, axis=-1), rtol=1e-9)
    np.testing.assert_allclose(metric.js_divergence(a, b), jensenshannon(p, q, axis=-1) ** 2, rtol=1e-9)
    assert float(metric.kl_divergence(a, a + 3).abs().max()) < 1e-12
    assert float(metric.js_divergence([0.0, 1000.0], [1000.0, 0.0])) == pytest.approx(np.log(2))
    np.testing.assert_allclose(
        metric.cosine(a, b), (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)
    )


def test_logit_difference_and_loss() -> None:
    logits = torch.randn(3, 5, 7, generator=torch.Generator().manual_seed(0))
    ids = torch.randint(0, 7, (3, 5), generator=torch.Generator().manual_seed(1))
    assert metric.logit_difference(logits, 2, 4) == pytest.approx(logits[..., 2] - logits[..., 4])
    difference = metric.logit_difference(logits, ids, 0)
    assert float(difference[1, 3]) == pytest.approx(float(logits[1, 3, ids[1, 3]] - logits[1, 3, 0]))
    loss = metric.next_token_loss(logits, ids)
    assert float(loss[2, 1]) == pytest.approx(float(-logits[2, 1].log_softmax(-1)[ids[2, 2]]))


def test_intervals_cover_as_often_as_they_say() -> None:
    generator = np.random.default_rng(0)
    samples = generator.standard_normal((400, 6)) + 2
    found = [significance.mean_interval(sample) for sample in samples]
    covered = np.mean([e.low <= 2 <= e.high for e in found])
    assert 0.92 < covered < 0.98
    assert significance.mean_interval([3.0]).high == np.inf
    wilson = significance.proportion_interval(8, 10)
    assert (wilson.low, wilson.high) == (pytest.approx(0.4902, abs=1e-3), pytest.approx(0.9433, abs=1e-3))


def test_bootstrap_of_a_median_covers_it() -> None:
    generator = np.random.default_rng(0)
    sample = generator.exponential(size=200)
    found = significance.bootstrap_interval(sample, statistic=np.median, seed=1)
    assert found.low < np.log(2) < found.high
    assert found == significance.bootstrap_interval(sample, statistic=np.median, seed=1)


def test_permutation_tests_tell_an_effect_from_none() -> None:
    generator = np.random.default_rng(0)
    a, b = generator.standard_normal((2, 40))
    assert significance.difference_test(a + 1.5, b, seed=0).p < 0.01
    assert significance.difference_test(a, b, seed=0).p > 0.05
    assert significance.correlation_test(a, a + 0.5 * b, seed=0).p < 0.01
    assert significance.correlation_test(a, b, seed=0).p > 0.05
    assert significance.correlation_test(a, np.exp(3 * a), seed=0).value == pytest.approx(1)
    assert np.isnan(significance.correlation_test(a, np.ones(40), seed=0).value)


def test_correction_bounds_false_positives() -> None:
    p = np.random.default_rng(0).uniform(size=(200, 64))
    families = [significance.significant(row, level=0.05).any() for row in p]
    assert np.mean(families) < 0.1
    assert (p < 0.05).any(1).mean() > 0.9  # what would happen without it
    mixed = np.array([1e-9, 2e-4, 0.009, 0.5, np.nan])
    assert significance.significant(mixed, level=0.01).tolist() == [True, True, False, False, False]
    assert significance.significant(mixed, level=0.02, method="benjamini-hochberg").tolist()[:3] == [True, True, True]


def test_logit_lens_is_that_of_the_weights(tmp_path: Path) -> None:
    model = TinyModel(n_layers=3)
    prompts = [{"tokens": p["tokens"]} for p in random_prompts(30)]
    run = actdb.harvest(model, prompts, out=tmp_path / "x.actdb", sites=["resid_post"], store="float32")
    found = logit_lens(run, lambda x: x @ model.W_E.detach().T, block_rows=17)
    rows = [model(torch.tensor([p["tokens"]])).detach()[0] for p in prompts]
    ranks = [
        int((logits[i] > logits[i, p["tokens"][i + 1]]).sum())
        for logits, p in zip(rows, prompts, strict=True)
        for i in range(len(logits) - 1)
    ]
    assert found.agreement[-1] == 1
    assert found.kl[-1] == pytest.approx(0, abs=1e-9)
    assert found.kl[0] > 0.01
    assert found.n_rows == len(ranks)
    assert found.rank[-1] == pytest.approx(np.mean(ranks))
    assert found.accuracy[-1] == pytest.approx(np.mean(np.array(ranks) == 0))


def test_verdicts_follow_the_interval() -> None:
    claim = report.claim("x", significance.Estimate(0.5, 0.4, 0.6, 9), claimed=0.55)
    assert claim.judged().verdict == "compatible with the claim"
    assert report.claim("x", significance.Estimate(0.5, 0.4, 0.6, 9), claimed=0.7).judged().verdict == "below the claim"
    assert report.claim("x", 0.9, claimed=0.7).judged(tolerance=0.3).verdict == "compatible with the claim"
    assert report.claim("x", significance.Estimate(0.5, 0.4, 0.6, 9), null=0.45).judged().verdict == "no effect"
    assert report.claim("x", significance.Estimate(0.5, 0.4, 0.6, 9), null=0.1).judged().verdict == "above chance"
    assert report.claim("x", float("nan"), claimed=1.0).judged().verdict == "not measurable"


def test_a_study_is_written_and_stored(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def study(options: program.Options) -> program.Study:
        run = actdb.harvest(TinyModel(), random_prompts(3), out=options.db)
        made = [report.claim("a.b", significance.Estimate(1.5, 1.0, 2.0, 7), gold=1.4, seed=options.seed, about="x|y")]
        return program.Study(run.name, made, text={"Why": "because"})

    out = tmp_path / "out"
    assert program.main("some_study", study, ["--out", str(out), "--seed", "5"], about="a study") == 0
    assert capsys.readouterr().out.splitlines()[0].split() == [*report.HEADINGS]
    written = json.loads((out / "results.json").read_text())
    assert written["analysis"] == "some_study"
    assert [*written["results"][0]] == [*report.COLUMNS]
    assert "x\\|y" in (out / "report.md").read_text()
    with actdb.open(out / "study.actdb") as db:
        row = db.sql("SELECT analysis, run, key, value, low, high, n, seed, gold FROM results").fetchone()
    assert row == ("some_study", "tiny", "a.b", 1.5, 1.0, 2.0, 7, 5, 1.4)


def test_an_actdb_error_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def study(options: program.Options) -> program.Study:
        raise actdb.RunError("no run 'x'")

    assert program.main("some_study", study, ["--out", str(tmp_path)], about="a study") == 1
    assert capsys.readouterr().err == "some_study: no run 'x'\n"


def test_figures_are_written_by_their_name(tmp_path: Path) -> None:
    made, axes = figure.new_figure(2, 2, title="all kinds")
    figure.heat_map(axes[0], np.eye(3), title="t", x="x", y="y", label="l", y_ticks=["a", "b", "c"])
    figure.curves(axes[1], [0, 1], {"a": np.ones((3, 2)), "b": np.zeros(2)}, title="t", x_label="x", y_label="y")
    figure.histograms(axes[2], {"a": np.arange(9.0), "b": np.array([1.0, np.nan])}, title="t", x_label="x")
    figure.intervals(axes[3], {"a": (1, 0, 2)}, title="t", x_label="x", marks={"a": 1.5})
    for name in ("a.png", "a.svg"):
        figure.save(made, tmp_path / "deep" / name)
    assert (tmp_path / "deep" / "a.png").read_bytes()[:4] == b"\x89PNG"
    assert (
        b"all kinds" in (tmp_path / "deep" / "a.svg").read_bytes() or (tmp_path / "deep" / "a.svg").stat().st_size > 999
    )


def test_analyses_import_the_public_api_alone() -> None:
    """`import actdb` and `actdb.plots`: an analysis that needs more shows what the API lacks."""
    for file in Path(str(common.__file__)).parents[1].rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "actdb":
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            used = {name for name in names if name.split(".")[0] == "actdb"}
            assert used <= {"actdb", "actdb.plots"}, f"{file}: {used}"
