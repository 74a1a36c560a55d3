"""Pictures: what they show equals what is stored, every text is legible, every bad input is one line."""

import base64
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hooked import TinyModel, random_prompts
from hypothesis import given
from hypothesis import strategies as st
from matplotlib import colormaps
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.text import Text

import actdb
from actdb import plots
from actdb.cli import main
from actdb.errors import SelectionError, SettingError, SiteError
from actdb.output import text_width
from actdb.plots import style
from actdb.plots.neuron import top_contexts
from actdb.plots.source import chosen_positions
from actdb.plots.token_line import place_tokens

PROMPTS = random_prompts(14, d_vocab=40, longest=20, seed=3)
LONGEST = max(range(len(PROMPTS)), key=lambda i: len(PROMPTS[i]["tokens"]))
TOKENS = PROMPTS[LONGEST]["tokens"]
ODD_TOKENS = ["<s>", " the", "\n", "\t", "$x$", "a$b", "é", "中文", "\ufffd", "", "🙂", "\x07", "\\n", "·", "_^{", "ﷺ"]
NODE = shutil.which("node")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, model_folder: Callable[[str], Path]) -> Path:
    """A database of a LayerNorm transformer with MLPs (run `mlp`), and one without statistics or patterns (`bare`)."""
    path = tmp_path_factory.mktemp("plots") / "x.actdb"
    options: dict[str, Any] = {"store": "float32", "stats": ["heads", "neurons", "tokens"]}
    actdb.harvest(TinyModel(), random_prompts(5), path, run="bare", sites=["z"], stats=[])
    actdb.harvest(model_folder("native-mlp"), PROMPTS, path, run="mlp", **options)
    return path


@pytest.fixture
def db(root: Path) -> Iterator[actdb.Database]:
    with actdb.open(root) as opened:
        yield opened


@pytest.fixture(scope="module")
def computed(bridge: Callable[..., Any]) -> dict[str, np.ndarray]:
    """What the model itself says on the longest prompt, by hook name, and the lens by its own modules."""
    import torch

    model = bridge("native-mlp")
    with torch.no_grad():
        logits, cache = model.run_with_cache(torch.tensor([TOKENS]))
        lens = [model.unembed(model.ln_final(cache[f"blocks.{layer}.hook_resid_post"])) for layer in (0, 1)]
    values = {name: value[0].numpy() for name, value in cache.items()}
    return {**values, "logits": logits[0].numpy(), "lens": torch.stack(lens)[:, 0].numpy()}


def softmax(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits.astype(np.float64) - logits.max(-1, keepdims=True))
    return np.asarray(weights / weights.sum(-1, keepdims=True))


def images(figure: Figure) -> list[np.ma.MaskedArray]:
    return [axes.images[0].get_array() for axes in figure.axes if axes.images]


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.findobj(Text) if text.get_text() and text.get_visible()]


def drawn_texts(figure: Figure) -> list[Text]:
    """Return the texts that are drawn: labels of ticks only where the tick lies within its axis."""
    labels, drawn = set(), []
    for axis in figure.findobj(Axis):
        low, high = sorted(axis.get_view_interval())
        for tick in [*axis.get_major_ticks(), *axis.get_minor_ticks()]:
            labels |= {tick.label1, tick.label2}
            inside = low - 1e-6 <= tick.get_loc() <= high + 1e-6 and axis.axes.axison
            drawn += [label for label in (tick.label1, tick.label2) if inside]
    drawn += [text for text in figure.findobj(Text) if text not in labels]
    return [text for text in drawn if text.get_visible() and text.get_text().strip()]


def assert_legible(figure: Figure) -> None:
    """Every text lies within the picture, is not tiny, and no two labels of an axis overlap."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    renderer = canvas.get_renderer()
    drawn = drawn_texts(figure)
    boxes = {text: text.get_window_extent(renderer) for text in drawn}
    inside = figure.bbox.padded(1)
    for text, box in boxes.items():
        assert inside.contains(box.x0, box.y0), text.get_text()
        assert inside.contains(box.x1, box.y1), text.get_text()
        assert text.get_fontsize() >= 5.5
    for axis in figure.findobj(Axis):
        along = 0 if axis.axis_name == "x" else 1
        for side in ("label1", "label2"):
            labels = [boxes[label] for tick in axis.get_major_ticks() if (label := getattr(tick, side)) in boxes]
            labels.sort(key=lambda box: float(box.min[along]))
            for box, after in pairwise(labels):
                assert box.max[along] <= after.min[along] + 1


# Heads


@pytest.mark.parametrize("where", [None, "kind = 'b'"])
def test_heads_are_means_over_prompts(db: actdb.Database, where: str | None) -> None:
    names = ["prev_mass", "duplicate_mass", "z_norm"]
    figure = plots.heads(db, names, run="mlp", where=where)
    rows = db.sql(f"SELECT layer, head, prompt_id, {', '.join(names)} FROM head_stats WHERE run = 'mlp'").fetchall()
    for i, shown in enumerate(images(figure)):
        assert shown.shape == (2, 3)
        for layer, head in np.ndindex(2, 3):
            values = [
                row[3 + i]
                for row in rows
                if row[:2] == (layer, head) and row[3 + i] is not None and (where is None or row[2] % 2 == 1)
            ]
            assert shown[layer, head] == pytest.approx(np.mean(values), rel=1e-5)
    assert_legible(figure)
    assert texts(figure).count("layer") == len(names)
    assert any(("where" in text) == (where is not None) and "mlp" in text for text in texts(figure))


def test_heads_show_six_columns_and_dashes_for_nulls(tmp_path: Path) -> None:
    """No token repeats in these prompts, so that duplicate and induction masses are null."""
    prompts = [{"tokens": list(range(first, first + 5))} for first in (0, 4, 8)]
    actdb.harvest(TinyModel(n_layers=3), prompts, tmp_path / "x", sites="none", stats=["heads"])
    with actdb.open(tmp_path / "x") as db:
        figure = plots.heads(db)
        assert len(images(figure)) == 6
        assert texts(figure).count("–") == 2 * 3 * 2
        assert_legible(figure)
        with pytest.raises(SettingError, match="has no lens statistics; harvest it with --stats lens"):
            plots.heads(db, "direct_logit_attribution")


def test_large_grids_have_no_numbers() -> None:
    from actdb.plots.head_grid import _figure

    grids = np.random.default_rng(0).normal(size=(2, 48, 64))
    figure = _figure("large", ["prev_mass", "direct_logit_attribution"], range(48), grids)
    assert_legible(figure)
    assert len(texts(figure)) < 150
    for axes, grid in zip([axes for axes in figure.axes if axes.images], grids, strict=True):
        low, high = axes.images[0].get_clim()
        assert low == -high
        assert high == np.abs(grid).max()


# Patterns


@pytest.mark.parametrize("head", [None, 1, [0, 2]])
def test_patterns_are_those_stored(db: actdb.Database, head: Any) -> None:
    figure = plots.pattern(db, LONGEST, layer=1, head=head, run="mlp")
    heads = range(3) if head is None else [1] if head == 1 else head
    stored = db.run("mlp")["pattern"].sel(layer=1, prompt=LONGEST).numpy()
    shown = images(figure)
    assert len(shown) == len(heads)
    for number, image in zip(heads, shown, strict=True):
        assert np.array_equal(image.filled(0), stored[number])
        assert np.array_equal(image.mask, np.triu(np.ones(image.shape, bool), 1))
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert labels == [str(token) for token in TOKENS]
    assert [axes.get_title() for axes in figure.axes[: len(heads)]] == [f"layer 1 head {number}" for number in heads]
    assert_legible(figure)


def test_patterns_of_last_positions_and_of_models_that_look_both_ways(tmp_path: Path) -> None:
    tokens = [{"tokens": [1, 2, 3, 4, 5] * 6}]
    actdb.harvest(TinyModel(causal=False), tokens, tmp_path / "x", run="both")
    actdb.harvest(TinyModel(), tokens, tmp_path / "x", run="last", positions="last")
    with actdb.open(tmp_path / "x") as db:
        both, last = (plots.pattern(db, 0, layer=0, run=name) for name in ("both", "last"))
        assert not images(both)[0].mask.any()
        assert images(last)[0].shape == (1, 30)
        assert [label.get_text() for label in last.axes[0].get_yticklabels()] == ["5"]
        assert_legible(last)
        page = page_data(plots.attention_page(db, 0, run="last"))
        assert (page["queries"], page["causal"]) == ([29], False)


def test_labels_are_thinned_out() -> None:
    n = 300
    figure = plots.patterns_figure(
        [np.eye(n)], titles=["long"], tokens=[f"token{i}" for i in range(n)], title="many tokens"
    )
    labels = [label.get_text() for label in figure.axes[0].get_xticklabels()]
    assert 20 <= len(labels) <= 60
    assert labels[1] == f"token{-(-n // len(labels))}"
    assert_legible(figure)


def test_a_layer_of_many_heads_is_legible() -> None:
    generator = np.random.default_rng(0)
    patterns = [np.tril(softmax(generator.normal(size=(30, 30)))) for _ in range(12)]
    names = [f"layer 0 head {i}" for i in range(12)]
    figure = plots.patterns_figure(patterns, titles=names, tokens=["·word"] * 30, title="a layer")
    assert_legible(figure)
    assert len(images(figure)) == 12


def test_odd_tokens_are_drawn(tmp_path: Path) -> None:
    """No formula between dollar signs, no glyph that the fonts lack (a warning, and so an error here)."""
    n = len(ODD_TOKENS)
    figure = plots.patterns_figure([np.eye(n)], titles=["$a$"], tokens=ODD_TOKENS, title="odd $b$")
    assert_legible(figure)
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert labels[:6] == ["<s>", "·the", "↵", "⇥", "$x$", "a$b"]
    assert len(set(labels)) == n
    assert not any(text.get_parse_math() for text in drawn_texts(figure) if "$" in text.get_text())
    plots.save_figure(figure, tmp_path / "odd.svg")


@given(st.lists(st.text(st.sampled_from(" \n\t·↵⇥∅\\ntx2d7b") | st.characters(), max_size=3), max_size=30))
def test_visible_texts_stay_apart(found: list[str]) -> None:
    shown = [style.visible(text) for text in found]
    assert len(set(shown)) == len(set(found))
    for text in shown:
        assert text
        assert not re.search(r"\s", text)
        assert all(ord(character) in style._characters() for character in text)


@pytest.mark.parametrize("text", [" ", "\n", "\t", "", "\x07", "\u4e2d", "\ue000"])
def test_signs_themselves_are_escaped(text: str) -> None:
    shown = style.visible(text)
    assert style.visible(shown) != shown or shown == text


def test_text_on_every_colour_has_contrast() -> None:
    """By the formula of WCAG 2.1, at least 4.5 to 1."""
    for name in (style.COLOURS, style.DIVERGING):
        for colour in colormaps[name](np.linspace(0, 1, 256))[:, :3]:
            linear = np.where(colour <= 0.04045, colour / 12.92, ((colour + 0.055) / 1.055) ** 2.4)
            luminance = linear @ [0.2126, 0.7152, 0.0722]
            contrast = (luminance + 0.05) / 0.05 if style.ink(colour) == "black" else 1.05 / (luminance + 0.05)
            assert contrast >= 4.5


@given(st.text(max_size=20), st.integers(2, 12))
def test_cut_texts_fit(text: str, width: int) -> None:
    shown = style.cut(text, width)
    assert text_width(shown) <= max(width, 1)
    assert shown == text or (shown.endswith("…") and text.startswith(shown[:-1]))


# Pages


def page_data(page: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert found is not None
    return dict(json.loads(found[1]))


def show(page: str, events: list[tuple[str, Any]], folder: Path) -> dict[str, Any]:
    """Run a page's script in node and return what it shows after some events."""
    (folder / "page.html").write_text(page, encoding="utf-8")
    program = Path(__file__).parent / "page.mjs"
    command = [str(NODE), str(program), str(folder / "page.html"), json.dumps(events)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


def unpacked(data: dict[str, Any], head: int) -> np.ndarray:
    steps = np.frombuffer(base64.b64decode(data["heads"][head]["weights"]), np.uint8)
    n = len(data["tokens"])
    square = np.zeros((n, n))
    square[np.tril_indices(n)] = steps / data["steps"]
    return square


def test_the_attention_page_holds_every_head(db: actdb.Database) -> None:
    page = plots.attention_page(db, LONGEST, run="mlp")
    data = page_data(page)
    stored = db.run("mlp")["pattern"].sel(prompt=LONGEST).numpy()
    names = [(head["layer"], head["head"]) for head in data["heads"]]
    assert names == [(layer, head) for layer in range(2) for head in range(3)]
    for i, plane in enumerate(names):
        assert np.abs(unpacked(data, i) - stored[plane]).max() <= 0.5 / 255 + 1e-6
    assert data["tokens"] == [str(token) for token in TOKENS]


@pytest.mark.parametrize("make", [plots.attention_page, plots.tokens_page])
def test_pages_refer_to_nothing_outside(db: actdb.Database, make: Callable[..., str]) -> None:
    page = make(db, LONGEST, run="mlp")
    page = page.replace(json.dumps(page_data(page), separators=(",", ":")), "")  # base64 may look like anything
    assert len(page) < 12_000
    assert "default-src 'none'" in page
    assert not re.search(r"https?:|//[a-z]|\bsrc=|\bhref=|url\(|@import|\bimport\b|fetch\(|XMLHttp|{{", page)


def test_no_text_can_leave_its_place() -> None:
    from actdb.plots.picture import fill_page

    evil = "</script><script>alert(1)</script><!--<script>"
    page = fill_page("tokens.html", evil, {"tokens": [evil, "{{title}}"]})
    assert page_data(page)["tokens"] == [evil, "{{title}}"]
    assert page.count("<script>") == 1
    assert "alert(1)</script>" not in page


@pytest.mark.skipif(NODE is None, reason="needs node")
def test_the_attention_page_shows_what_a_token_attends_to(db: actdb.Database, tmp_path: Path) -> None:
    page = plots.attention_page(db, LONGEST, run="mlp")
    stored = db.run("mlp")["pattern"].sel(prompt=LONGEST).numpy()
    shown = show(page, [["head", 4], ["focus", 6]], tmp_path)
    row = stored[1, 1, 6]
    assert shown["column"] == "layer 1 head 1: token attended to"
    for key, span in enumerate(shown["spans"]):
        found = re.fullmatch(rf"position {key}(?:: (.*))?", span["title"])
        assert found is not None
        assert (found[1] is None) == (key > 6) == ("none" in span["classes"])
        if found[1] is not None:
            assert float(found[1]) == pytest.approx(row[key], abs=0.003)
    assert [span["classes"] for span in shown["spans"]].index(["chosen"]) == 6
    weights = [float(cells[2]) for cells in shown["rows"]]
    assert weights == sorted(weights, reverse=True)
    assert weights[0] == pytest.approx(row.max(), abs=0.003)
    shown = show(page, [["head", 4], ["click", 3], ["focus", 6], ["direction", "to"]], tmp_path)
    titles = [span["title"].partition(": ")[2] for span in shown["spans"]]  # held at 3, whatever has the focus
    assert titles[:3] == ["", "", ""]
    assert [float(text) for text in titles[3:]] == pytest.approx(stored[1, 1, 3:, 3].tolist(), abs=0.003)
    picture = np.array(shown["pictures"][4], np.uint8).reshape(len(TOKENS), len(TOKENS), 4)
    assert (picture[np.triu_indices(len(TOKENS), 1)] == 255).all()
    assert not (picture[np.tril_indices(len(TOKENS))] == 255).all(-1).any()
    assert "MOST_PIXELS = 96" in page
    shown = show(page.replace("MOST_PIXELS = 96", "MOST_PIXELS = 7"), [], tmp_path)
    block = -(-len(TOKENS) // 7)
    colours = np.frombuffer(bytes.fromhex(page_data(page)["colours"]), np.uint8).reshape(256, 3)
    starts = range(0, len(TOKENS), block)
    squares = [[unpacked(page_data(page), 4)[q : q + block, k : k + block] for k in starts] for q in starts]
    highest = np.array([[square.max() for square in line] for line in squares])
    picture = np.array(shown["pictures"][4], np.uint8).reshape(len(starts), len(starts), 4)
    wanted = np.where(np.tri(len(starts))[..., None] > 0, colours[np.rint(255 * highest).astype(int)], 255)
    assert np.array_equal(picture[..., :3], wanted)


@pytest.mark.skipif(NODE is None, reason="needs node")
def test_the_tokens_page_shows_the_chosen_column(db: actdb.Database, tmp_path: Path) -> None:
    page = plots.tokens_page(db, LONGEST, run="mlp")
    shown = show(page, [["column", "rank"], ["mouseenter", 2]], tmp_path)
    loss, entropy, rank = db.sql(
        "SELECT loss, entropy, rank FROM token_stats WHERE run = 'mlp' AND prompt_id = ? AND pos = 1", [LONGEST]
    ).fetchall()[0]
    assert shown["shown"] == f"{TOKENS[2]}  position 2: loss {loss:.3f}, entropy {entropy:.3f}, rank {rank}"
    assert shown["unit"].startswith("rank")
    assert shown["spans"][0]["classes"] == ["none"]
    ranks = [value for value in page_data(page)["values"]["rank"] if value is not None]
    assert shown["most"] == str(max(ranks))
    highest = bytes.fromhex(page_data(page)["colours"][-6:])
    assert shown["spans"][1 + ranks.index(max(ranks))]["background"] == f"rgb({','.join(map(str, highest))})"


def test_pages_that_would_be_too_long_are_refused(db: actdb.Database, monkeypatch: pytest.MonkeyPatch) -> None:
    n = len(TOKENS)
    monkeypatch.setattr("actdb.plots.page.MAX_BYTES", n * n // 2)
    with pytest.raises(SelectionError, match="choose a layer, a head or a shorter prompt"):
        plots.attention_page(db, LONGEST, layer=0, run="mlp")
    assert len(page_data(plots.attention_page(db, LONGEST, layer=0, head=0, run="mlp"))["heads"]) == 1


# Neurons


def test_neurons_are_those_stored(db: actdb.Database) -> None:
    run = db.run("mlp")
    selection = run["mlp_post"].sel(layer=1, neuron=7)
    values = selection.numpy()
    figure = plots.neurons(db, layer=1, neuron=7, n_contexts=6, run="mlp")
    bars = [patch for patch in figure.axes[0].patches if isinstance(patch, Rectangle)]
    counts, edges = np.histogram(values, bins=60)
    assert [bar.get_height() for bar in bars] == counts.tolist()
    assert np.allclose([bar.get_x() for bar in bars], edges[:-1], atol=1e-6)
    contexts = top_contexts(db, layer=1, neuron=7, k=6, run="mlp")
    order = np.lexsort((selection.pos, selection.prompt, -values))[:6]
    assert [(c.prompt_id, c.pos) for c in contexts] == [(selection.prompt[i], selection.pos[i]) for i in order]
    assert np.allclose([c.value for c in contexts], values[order], atol=1e-6)
    for context in contexts:
        tokens = [str(token) for token in PROMPTS[context.prompt_id]["tokens"]]
        assert context.token == tokens[context.pos]
        assert "".join(f"{token} " for token in tokens[: context.pos]).endswith(context.before.lstrip("…"))
        assert "".join(f" {token}" for token in tokens[context.pos + 1 :]).startswith(context.after.rstrip("…"))
    shown = texts(figure)
    assert all(f"{context.prompt_id}:{context.pos}" in shown for context in contexts)
    bold = [text.get_text() for text in figure.findobj(Text) if text.get_weight() == "bold"]
    assert bold == [context.token for context in contexts]
    assert_legible(figure)


def test_neurons_of_any_site_of_rows(db: actdb.Database) -> None:
    figure = plots.neurons(db, layer=1, neuron=5, site="resid_post", n_contexts=100, run="mlp")
    values = db.run("mlp")["resid_post"].sel(layer=1, neuron=5).numpy()
    (marks,) = figure.axes[0].lines
    assert np.allclose(marks.get_xdata(), np.sort(values)[::-1][:100])
    assert any("resid_post, layer 1 neuron 5" in text for text in texts(figure))


def test_contexts_are_cut_on_both_sides(tmp_path: Path) -> None:
    """A neuron that fires in the middle of a long prompt, of which both ends do not fit."""
    tokens = np.random.default_rng(0).integers(0, 16, 400).tolist()
    actdb.harvest(TinyModel(n_ctx=400), [{"tokens": tokens}], tmp_path / "x", sites=["mlp_post"])
    with actdb.open(tmp_path / "x") as db:
        assert len(top_contexts(db, layer=0, neuron=0, k=500)) == 400  # more than there are rows
        places = {context.pos: context for i in range(16) for context in top_contexts(db, layer=0, neuron=i, k=16)}
        context = next(context for pos, context in places.items() if 60 < pos < 340)
    text = [str(token) for token in tokens]
    before, after = " ".join([*text[: context.pos], ""]), " ".join(["", *text[context.pos + 1 :]])
    assert context.before.startswith("…")
    assert before.endswith(context.before[1:])
    assert context.after.endswith("…")
    assert after.startswith(context.after[:-1])
    assert (len(context.before), len(context.token + context.after)) == (34, 44)


# Lens


@pytest.mark.parametrize("block_values", [2**24, 150])
def test_the_lens_is_the_models_own(
    db: actdb.Database, computed: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch, block_values: int
) -> None:
    monkeypatch.setattr("actdb.plots.logit_lens.BLOCK_VALUES", block_values)
    wanted = softmax(computed["lens"])
    final = softmax(computed["logits"])
    assert np.allclose(final, wanted[-1], atol=1e-6)
    entropy = -(wanted * np.log(wanted)).sum(-1)
    divergence = (final * (np.log(final) - np.log(wanted))).sum(-1)
    for colour, values in (("probability", wanted.max(-1)), ("entropy", entropy), ("kl", divergence)):
        figure = plots.lens(db, LONGEST, colour=colour, run="mlp")
        assert np.allclose(images(figure)[0], values, atol=1e-4)
        assert_legible(figure)
    low, high = figure.axes[0].get_ylim()
    assert low < high  # the last layer is the highest
    renderer = figure.canvas.get_renderer()  # type: ignore[attr-defined]
    width = figure.axes[0].get_window_extent(renderer).width / len(TOKENS)
    assert all(text.get_window_extent(renderer).width < width for text in figure.axes[0].texts)
    cells = {text.get_position(): text.get_text() for text in figure.axes[0].texts}
    known = db.run("mlp").vocabulary()
    likeliest = wanted.argmax(-1)
    for layer, place in np.ndindex(likeliest.shape):
        token = int(likeliest[layer, place])
        assert cells[place, layer] == known.get(token, f"#{token}")


def test_right_tokens_are_framed(
    tmp_path: Path, model_folder: Callable[[str], Path], bridge: Callable[..., Any]
) -> None:
    """On a prompt that the model went on with itself, by its likeliest tokens."""
    import torch

    tokens = [3, 7]
    with torch.no_grad():
        while len(tokens) < 12:
            tokens.append(int(bridge("native-mlp")(torch.tensor([tokens]))[0, -1].argmax()))
    actdb.harvest(model_folder("native-mlp"), [{"tokens": tokens}], tmp_path / "x", sites=["resid_post"])
    with actdb.open(tmp_path / "x") as db:
        (axes, _) = plots.lens(db, 0).axes
    cells = {text.get_position(): text.get_text() for text in axes.texts}
    frames = {(round(frame.get_x() + 0.47), round(frame.get_y() + 0.46)) for frame in axes.patches}
    assert {(place, 1) for place in range(1, 11)} <= frames
    assert frames == {
        (place, layer) for place, layer in cells if place < 11 and cells[place, layer] == str(tokens[place + 1])
    }


def test_the_lens_at_some_positions(db: actdb.Database, computed: dict[str, np.ndarray]) -> None:
    wanted = softmax(computed["lens"]).max(-1)
    for pos, places in ((slice(2, 6), [2, 3, 4, 5]), (-1, [len(TOKENS) - 1]), ([5, 1], [5, 1])):
        figure = plots.lens(db, LONGEST, pos=pos, run="mlp")
        assert np.allclose(images(figure)[0], wanted[:, places], atol=1e-4)
        assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == [str(TOKENS[i]) for i in places]


def test_the_lens_of_statistics_is_that_of_the_residuals(
    db: actdb.Database, tmp_path: Path, model_folder: Callable[[str], Path]
) -> None:
    options: dict[str, Any] = {"sites": "none", "stats": ["lens"]}
    actdb.harvest(model_folder("native-mlp"), PROMPTS, tmp_path / "x", **options)
    with actdb.open(tmp_path / "x") as other:
        for colour in ("probability", "entropy", "kl"):
            wanted = plots.lens(db, LONGEST, colour=colour, pos=slice(2, 9), run="mlp")
            found = plots.lens(other, LONGEST, colour=colour, pos=slice(2, 9))
            assert np.allclose(images(found)[0], images(wanted)[0], atol=1e-5)
            assert texts(found)[:34] == texts(wanted)[:34]


def test_a_long_lens_has_no_text_in_its_cells(tmp_path: Path, model_folder: Callable[[str], Path]) -> None:
    from actdb.plots import logit_lens

    actdb.harvest(model_folder("native-mlp"), [{"tokens": list(range(20))}], tmp_path / "x", sites=["resid_post"])
    with actdb.open(tmp_path / "x") as db, pytest.MonkeyPatch.context() as patch:
        patch.setattr(logit_lens, "MOST_CELLS", 10)
        figure = plots.lens(db, 0)
        assert len(figure.axes[0].texts) == 0
        assert_legible(figure)
        assert len(plots.lens(db, 0, pos=slice(0, 10)).axes[0].texts) == 20


# Tokens


@pytest.mark.parametrize("column", ["loss", "entropy", "rank"])
def test_tokens_are_coloured_by_how_they_were_predicted(
    db: actdb.Database, computed: dict[str, np.ndarray], column: str
) -> None:
    p = softmax(computed["logits"])[:-1]
    following = np.array(TOKENS[1:])
    chosen = p[np.arange(len(following)), following]
    wanted = {
        "loss": -np.log(chosen),
        "entropy": -(p * np.log(p)).sum(-1),
        "rank": (p > chosen[:, None]).sum(-1),
    }[column]
    figure = plots.tokens(db, LONGEST, column=column, run="mlp")
    assert_legible(figure)
    axes, bar = figure.axes
    assert [text.get_text() for text in axes.texts] == [str(token) for token in TOKENS]
    assert axes.patches[0].get_facecolor() == to_rgba("white")
    scale = bar._colorbar.mappable
    assert scale.get_clim() == pytest.approx((0, wanted.max()), rel=1e-4)
    for box, value in zip(axes.patches[1:], wanted, strict=True):
        assert box.get_facecolor() == pytest.approx(scale.to_rgba(value), abs=0.01)


@given(
    tokens=st.lists(st.tuples(st.text("ab中", min_size=1, max_size=15), st.booleans()), min_size=1, max_size=40),
    width=st.integers(4, 20),
)
def test_tokens_are_set_in_lines(tokens: list[tuple[str, bool]], width: int) -> None:
    places = place_tokens([text for text, _ in tokens], [ends for _, ends in tokens], width)
    end = (0, 0)
    for (line, column, shown), (text, ends) in zip(places, tokens, strict=True):
        assert shown == style.cut(text, width)
        assert column + text_width(shown) <= width
        assert (line, column) in (end, (end[0] + 1, 0))
        if (line, column) != end:
            assert end[1] + text_width(shown) > width  # only what does not fit goes to the next line
        end = (line + 1, 0) if ends else (line, column + text_width(shown))


@pytest.mark.parametrize("pos", [None, slice(1, -1), slice(None, None, 2), 3, -2, [4, 0], np.array([1, -1])])
def test_positions_are_those_of_a_list(pos: Any) -> None:
    n = 6
    wanted = np.arange(n)[slice(None) if pos is None else pos]
    assert chosen_positions(n, pos) == np.ravel(wanted).tolist()


# Files and errors


def command(*arguments: object) -> int:
    """Run a command and return its exit code."""
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    return int(stop.value.code or 0)


BEGINNINGS = {".png": b"\x89PNG", ".svg": b"<?xml", ".pdf": b"%PDF", ".html": b"<!DOCTYPE html>"}


@pytest.mark.parametrize(
    "arguments",
    [
        ("heads", "-o", "x.png"),
        ("heads", "--column", "entropy,self_mass", "--where", "kind = 'a'", "-o", "x.pdf"),
        ("pattern", "--prompt", LONGEST, "--layer", 1, "--head", 2, "-o", "x.svg"),
        ("pattern", "--prompt", LONGEST, "--layer", 0, "-o", "x.PNG"),
        ("pattern", "--prompt", LONGEST, "-o", "x.html"),
        ("neurons", "--layer", 0, "--neuron", 3, "-k", 4, "-o", "x.png"),
        ("lens", "--prompt", LONGEST, "--pos", "0:5", "--colour", "kl", "-o", "x.png"),
        ("tokens", "--prompt", LONGEST, "--column", "rank", "-o", "x.png"),
        ("tokens", "--prompt", LONGEST, "-o", "x.html"),
    ],
)
def test_each_command_makes_its_file(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], arguments: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    assert command("plot", root, *arguments, "--run", "mlp") == 0
    assert capfd.readouterr() == ("", "")
    (path,) = tmp_path.iterdir()
    content = path.read_bytes()
    assert path.name == arguments[-1]
    assert content.startswith(BEGINNINGS[path.suffix.lower()])
    assert command("plot", root, *arguments, "--run", "mlp") == 0
    assert path.read_bytes() == content  # the same picture, the same bytes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("heads", "--column", "entrpy"),
            "no head statistic 'entrpy'; did you mean 'entropy'? choose entropy, first_mass",
        ),
        (("heads", "--where", "kind = 'c'"), "no prompt of run 'mlp' satisfies \"kind = 'c'\""),
        (("heads", "--where", "knid = 'a'"), 'no column "knid"; did you mean "kind"?'),
        (("heads", "--run", "bare"), "run 'bare' has no heads statistics; harvest it with --stats heads"),
        (("heads", "--run", "none"), "no run 'none'"),
        (("heads", "-o", "x.html"), "x.html: choose a name that ends in .png, .svg, .pdf"),
        (("pattern", "--prompt", 0, "-o", "x.gif"), "x.gif: choose a name that ends in .png, .svg, .pdf, .html"),
        (("pattern", "--prompt", 0), "choose one layer; run 'mlp' keeps patterns of layers 0, 1"),
        (("pattern", "--prompt", 99, "--layer", 0), "prompt 99: run 'mlp' has prompts 0 to 13"),
        (("pattern", "--prompt", 0, "--layer", 0, "--head", 3), "heads 0 to 2"),
        (("pattern", "--prompt", 0, "--run", "bare"), "keeps no attention patterns; harvest it with site pattern"),
        (("pattern", "--prompt", 0, "--run", "bare", "-o", "x.html"), "keeps no attention patterns"),
        (("neurons", "--layer", 0, "--neuron", 99_999), "neurons 0 to 95"),
        (("neurons", "--layer", 0, "--neuron", 0, "--run", "bare"), "no site 'mlp_post'"),
        (("neurons", "--site", "z", "--layer", 0, "--neuron", 0), "need a site of rows without heads"),
        (("neurons", "--neuron", 0), "and a layer"),
        (("neurons", "--layer", 0, "--neuron", 0, "-k", 101), "101 contexts: a picture shows 1 to 100"),
        (
            ("lens", "--prompt", 0, "--run", "bare"),
            "neither site 'resid_post' nor lens statistics; harvest it with one",
        ),
        (("lens", "--prompt", 0, "--colour", "entropi"), "no colour 'entropi'; did you mean 'entropy'?"),
        (("lens", "--prompt", 0, "--pos", "99"), "pos 99: the prompt has positions 0 to"),
        (("lens", "--prompt", 0, "--pos", "90:99"), "no position is selected"),
        (("tokens", "--prompt", 0, "--column", "los"), "no token statistic 'los'; did you mean 'loss'?"),
        (
            ("tokens", "--prompt", 0, "--run", "bare"),
            "run 'bare' has no tokens statistics; harvest it with --stats tokens",
        ),
        (("tokens", "--prompt", -1), "prompt -1: run 'mlp' has prompts 0 to 13"),
    ],
)
def test_bad_input_is_one_line(
    root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    arguments: tuple[object, ...],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    more: tuple[object, ...] = () if "-o" in arguments else ("-o", "x.png")
    run: tuple[object, ...] = () if "--run" in arguments else ("--run", "mlp")
    assert command("plot", root, *arguments, *more, *run) == 1
    out, err = capfd.readouterr()
    assert out == ""
    assert err.startswith("actdb: ")
    assert err.count("\n") == 1
    assert message in err
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_suffix_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    def never() -> Figure:
        raise AssertionError

    with pytest.raises(SettingError, match="choose a name"):
        plots.save(tmp_path / "x.gif", never)
    with pytest.raises(actdb.WriteError, match="cannot write"):
        plots.save_page("", tmp_path / "none" / "x.html")


def test_patterns_not_kept_whole_are_refused(tmp_path: Path) -> None:
    actdb.harvest(TinyModel(), random_prompts(3), tmp_path / "x", pattern="topk:2")
    with actdb.open(tmp_path / "x") as db, pytest.raises(SiteError, match="only the largest weights .* --pattern full"):
        plots.pattern(db, 0, layer=0)


def test_too_many_tokens_for_a_picture(db: actdb.Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("actdb.plots.token_line.MAX_TOKENS", 8)
    with pytest.raises(SelectionError, match="choose some, such as pos 0:8, or make an .html page"):
        plots.tokens(db, LONGEST, run="mlp")
    assert len(plots.tokens(db, LONGEST, pos=slice(0, 8), run="mlp").axes[0].texts) == 8


@pytest.mark.parametrize("kind", ["heads", "pattern", "neurons", "lens", "tokens"])
def test_help_needs_no_database(kind: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert command("plot", kind, "--help") == 0
    assert "--output" in capfd.readouterr().out


def test_plots_are_imported_when_asked_for() -> None:
    program = """
import sys, actdb
assert "actdb.plots" not in sys.modules
assert actdb.plots.pattern.__module__ == "actdb.plots.attention"
assert not {"matplotlib", "torch", "duckdb", "pyarrow", "pandas"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", program], check=True)
    with pytest.raises(AttributeError, match="no attribute 'plot'"):
        _ = actdb.plot  # type: ignore[attr-defined]
