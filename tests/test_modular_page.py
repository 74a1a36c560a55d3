"""The page of the concept graphs: what it holds, that it loads nothing, and how it looks and acts in a browser."""

import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from analyses.modular_arithmetic.graph import HISTORY, Shown, draw_place
from analyses.modular_arithmetic.layout import LAYOUTS
from analyses.modular_arithmetic.page import fill_page, write_page
from analyses.modular_arithmetic.representation import Representation
from analyses.modular_arithmetic.topology import measure

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
TITLE = "Numbers & <models>"
PHOTOGRAPHS = os.environ.get("ACTDB_PHOTOGRAPHS")
"""A folder in which the photographs are kept, to be looked at."""


def place(name: str, modulus: int, frequency: int, *, noise: float) -> dict[str, Any]:
    """Return a place whose numbers lie on a noised circle of a frequency."""
    random = np.random.default_rng(frequency)
    angles = 2 * np.pi * frequency * np.arange(modulus) / modulus
    circle = np.stack([np.cos(angles), np.sin(angles)], axis=1) @ random.standard_normal((2, 8))
    held = Representation(name, circle + noise * random.standard_normal((modulus, 8)))
    numbers = {"norm": held.norms, "accuracy as answer": np.linspace(0, 1, modulus)}
    return draw_place(Shown(held, measure(held, n_null=3, seed=0), numbers), {}, seed=0)


def model(name: str, modulus: int, frequency: int, epochs: tuple[int, ...]) -> dict[str, Any]:
    """Return a model of two places that comes nearer to a circle from checkpoint to checkpoint."""
    checkpoints = [
        {
            "run": f"{name}-step{epoch}",
            "epoch": epoch,
            "places": [
                place("embedding", modulus, frequency, noise=0.3 / (1 + epoch)),
                place("layer 0 answer", modulus, frequency + 1, noise=0.05),
            ],
        }
        for epoch in epochs
    ]
    labels = [*list(HISTORY)[:2], "held-out accuracy", "weight norm"]
    values = {label: [1.0 / (i + 1 + at) for at in range(len(epochs))] for i, label in enumerate(labels)}
    values["weight norm"] = [40.0 - at for at in range(len(epochs))]
    history = {label: {"epoch": list(epochs), "value": value} for label, value in values.items()}
    return {"name": name, "modulus": modulus, "history": history, "checkpoints": checkpoints}


@pytest.fixture(scope="module")
def models() -> list[dict[str, Any]]:
    return [model("grokked", 13, 4, (0, 100, 1000)), model("pooled", 11, 2, (500,)), model("</script>", 7, 1, (0,))]


@pytest.fixture(scope="module")
def page(models: list[dict[str, Any]]) -> str:
    return fill_page(TITLE, models)


def own_part(page: str) -> str:
    """Return the page without plotly.js."""
    library = max(re.findall(r"<script>(.*?)</script>", page, re.DOTALL), key=len)
    assert len(library) > 1_000_000
    return page.replace(library, "")


def test_the_page_holds_the_models(page: str, models: list[dict[str, Any]]) -> None:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert found is not None
    data = json.loads(found[1])
    assert data["models"] == models
    assert data["layouts"] == list(LAYOUTS)
    assert data["cyclic"][0][1] == data["cyclic"][-1][1]
    assert (data["cyclic"][0][0], data["cyclic"][-1][0]) == (0, 1)


def test_the_page_loads_nothing(page: str) -> None:
    own = own_part(page)
    assert "default-src 'none'" in own
    assert "connect-src" not in own
    assert not re.search(r"https?:|//[a-z]|\bsrc=|\bhref=|url\(|@import|\bimport\b|fetch\(|XMLHttp|{{", own)
    assert "<title>Numbers &amp; &lt;models&gt;</title>" in own
    assert own.count("</script>") == 3


def test_a_page_that_cannot_be_written_leaves_nothing(tmp_path: Path, models: list[dict[str, Any]]) -> None:
    write_page(TITLE, models[:1], tmp_path / "x.html")
    assert [file.name for file in tmp_path.iterdir()] == ["x.html"]


# In a browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("needs Chromium")
    with sync_api.sync_playwright() as playwright:
        found = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--use-angle=swiftshader", "--enable-unsafe-swiftshader"]
        )
        yield found
        found.close()


@pytest.fixture
def opened(browser: Any, page: str, tmp_path: Path) -> Iterator[Any]:
    """The page opened from disk, offline; any error or request of it fails the test."""
    file = tmp_path / "topology.html"
    file.write_text(page, encoding="utf-8")
    context = browser.new_context(offline=True, viewport={"width": 1280, "height": 1250})
    tab = context.new_page()
    wrong: list[str] = []
    tab.on("pageerror", lambda error: wrong.append(str(error)))
    tab.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
    tab.on(
        "request", lambda request: wrong.append(request.url) if not request.url.startswith(("file:", "data:")) else None
    )
    tab.goto(file.as_uri())
    tab.wait_for_function("document.querySelectorAll('#measures tr').length > 0")
    yield tab
    context.close()
    assert wrong == []


def state(tab: Any, side: str = "left") -> dict[str, Any]:
    """What a side's plot shows."""
    return dict(
        tab.evaluate(
            """side => {
              const plot = document.getElementById(side + "-graph"), dots = plot.data[plot.data.length - 1];
              const history = document.getElementById(side + "-history");
              return {
                traces: plot.data.map(trace => trace.name), type: dots.type, text: dots.text, hover: dots.hovertext,
                x: Array.from(dots.x), y: Array.from(dots.y), z: dots.z && Array.from(dots.z),
                colour: Array.from(dots.marker.color), camera: plot.layout.scene && plot.layout.scene.camera,
                epoch: document.getElementById(side + "-epoch").textContent,
                history: (history.data || []).map(trace => trace.name),
                line: history.data && history.layout.shapes[0].x0,
              };
            }""",
            side,
        )
    )


def points(found: dict[str, Any]) -> np.ndarray:
    return np.array([found[axis] for axis in "xyz" if found[axis]]).T


def photograph(tab: Any, name: str, tmp_path: Path) -> np.ndarray:
    """Photograph the page; returns its pixels [row, column, 3]."""
    from matplotlib.image import imread

    folder = Path(PHOTOGRAPHS) if PHOTOGRAPHS else tmp_path
    tab.screenshot(path=folder / f"{name}.png", full_page=True)
    return np.asarray(imread(folder / f"{name}.png"))[..., :3]


def test_two_models_stand_side_by_side(opened: Any, models: list[dict[str, Any]], tmp_path: Path) -> None:
    for side, shown in zip(("left", "right"), models, strict=False):
        found = state(opened, side)
        last = shown["checkpoints"][-1]["places"][0]
        assert found["type"] == "scatter3d"
        assert points(found) == pytest.approx(np.array(last["layouts"]["pca"]["3"]))
        assert found["text"] == [str(n) for n in range(shown["modulus"])]
        assert found["hover"][2].startswith("<b>2</b><br>norm: ")
        assert "accuracy as answer: " in found["hover"][2]
    assert (
        state(opened, "left")["history"] != state(opened, "right")["history"] == []
    )  # of one checkpoint there is no course
    assert set(state(opened)["history"]) == set(models[0]["history"])
    heads = opened.locator("#shown th").all_text_contents()
    assert heads == ["", "grokked: embedding, epoch 1000", "pooled: embedding, epoch 500"]
    rows = dict(row.locator("td").all_text_contents()[:2] for row in opened.locator("#measures tr").all())
    assert rows["strongest frequency"] == "4"
    assert (rows["training loss"], rows["weight norm"]) == ("0.333", "38")
    pixels = photograph(opened, "side_by_side", tmp_path)
    graph = opened.locator("#left-graph").bounding_box()
    top, left = int(graph["y"]), int(graph["x"])
    inside = pixels[top : top + int(graph["height"]), left : left + int(graph["width"])]
    saturation = inside.max(-1) - inside.min(-1)
    assert (saturation > 0.2).mean() > 0.005  # the dots' colours are there: WebGL has drawn


def test_layout_dimension_layer_and_colour_can_be_chosen(
    opened: Any, models: list[dict[str, Any]], tmp_path: Path
) -> None:
    places = models[0]["checkpoints"][-1]["places"]
    opened.select_option("#layout", "circular")
    opened.check("[name=dimension][value='2']")
    assert state(opened)["type"] == "scatter"
    assert points(state(opened)) == pytest.approx(np.array(places[0]["layouts"]["circular"]["2"]))
    opened.select_option("#left-place", "layer 0 answer")
    opened.select_option("#layout", "spectral")
    assert points(state(opened)) == pytest.approx(np.array(places[1]["layouts"]["spectral"]["2"]))
    opened.select_option("#colour", "accuracy as answer")
    assert state(opened)["colour"] == pytest.approx(places[1]["numbers"]["accuracy as answer"])
    opened.select_option("#colour", "place on the circle")
    assert state(opened)["colour"] == [5 * n % 13 for n in range(13)]
    opened.check("[data-edges=similarity]")
    opened.check("[data-edges=neighbours]")
    assert sorted(state(opened)["traces"]) == ["addition", "neighbours", "number", "similarity"]
    photograph(opened, "flat", tmp_path)
    opened.select_option("#right-model", "none")
    assert opened.locator("#right-graph").is_hidden()
    opened.select_option("#left-model", "</script>")
    assert state(opened)["text"] == [str(n) for n in range(7)]


def test_the_checkpoint_is_chosen_by_slider_and_in_the_panel(opened: Any, models: list[dict[str, Any]]) -> None:
    checkpoints = models[0]["checkpoints"]
    opened.locator("#left-checkpoint").fill("0")
    found = state(opened)
    assert (found["epoch"], found["line"]) == ("epoch 0", 0)
    assert points(found) == pytest.approx(np.array(checkpoints[0]["places"][0]["layouts"]["pca"]["3"]))
    place = opened.evaluate(
        """() => {
          const plot = document.getElementById("left-history"), box = plot.getBoundingClientRect();
          const full = plot._fullLayout;
          const y = full.yaxis, at = plot.data[0];
          return [box.x + full.xaxis._offset + full.xaxis.c2p(100), box.y + y._offset + y.c2p(at.y[1])];
        }"""
    )
    opened.mouse.move(*place)
    opened.wait_for_timeout(200)
    opened.mouse.click(*place)
    opened.wait_for_function("document.getElementById('left-epoch').textContent === 'epoch 100'")
    assert opened.locator("#right-checkpoint").is_disabled()


def test_one_is_turned_with_the_other(opened: Any) -> None:
    box = opened.locator("#left-graph").bounding_box()
    middle = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    opened.mouse.move(*middle)
    opened.mouse.down()
    opened.mouse.move(middle[0] + 120, middle[1] + 40, steps=6)
    opened.mouse.up()
    opened.wait_for_timeout(300)
    left, right = (state(opened, side)["camera"]["eye"] for side in ("left", "right"))
    assert left == pytest.approx(right)
    assert left != pytest.approx({"x": 1.25, "y": 1.25, "z": 1.25})
    opened.select_option("#layout", "force")  # which keeps the view
    assert state(opened)["camera"]["eye"] == pytest.approx(left)


def test_pointing_at_a_number_shows_it(opened: Any, tmp_path: Path) -> None:
    opened.check("[name=dimension][value='2']")
    place = opened.evaluate(
        """() => {
          const plot = document.getElementById("left-graph"), box = plot.getBoundingClientRect();
          const {xaxis: x, yaxis: y} = plot._fullLayout;
          const dots = plot.data[plot.data.length - 1];
          return [box.x + x._offset + x.c2p(dots.x[5]), box.y + y._offset + y.c2p(dots.y[5])];
        }"""
    )
    opened.mouse.move(*place)
    opened.wait_for_selector("#left-graph .hovertext")
    text = opened.locator("#left-graph .hovertext").text_content()
    assert text.startswith("5norm: ")
    assert "accuracy as answer: 0.417" in text
