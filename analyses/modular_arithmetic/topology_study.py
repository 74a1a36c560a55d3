"""Step 8: the concept graphs of several models: figures, `topology.json`, and the page `topology.html`."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import actdb
from analyses.common.program import note
from analyses.common.report import Claim
from analyses.modular_arithmetic import topology_picture as picture
from analyses.modular_arithmetic.finding import Findings
from analyses.modular_arithmetic.graph import Shown, Subject, draw_subject
from analyses.modular_arithmetic.page import write_page

N_NULL, N_NULL_SMALL = 199, 99
LEVEL = 0.01
ANSWER = "answer"
JSON_FILE, PAGE_FILE = "topology.json", "topology.html"
MOST_ROWS = 4
SECTION = f"""\
Every model's numbers can be turned and compared in [{PAGE_FILE}]({PAGE_FILE}); [{JSON_FILE}]({JSON_FILE}) holds the
same graphs. In brackets the null: the numbers permuted, the strongest frequency chosen anew; of the loops Gaussian
clouds of the same covariance. A circle of one frequency has circularity near 1, all steps agreeing and one long loop;
several frequencies at once make a knot on a torus, whose steps still agree, while its circularity falls and its loops
grow shorter."""


def study_topology(
    db: actdb.Database, subjects: Sequence[Subject], *, folder: Path, seed: int, small: bool = False
) -> Findings:
    """Measure and draw the concept graphs of some models, the one to look at first; writes into `folder`.

    Raises `SettingError` without any model.
    """
    if not subjects:
        raise actdb.SettingError("no model to draw: give the runs of one at least")
    last: dict[str, dict[str, Shown]] = {}
    models: list[Mapping[str, Any]] = []
    for subject in subjects:
        note(f"topology of {subject.name}: {len(subject.runs)} checkpoints")
        draws = N_NULL_SMALL if small else N_NULL
        last[subject.name], described = draw_subject(db, subject, n_null=draws, seed=seed)
        models.append(described)
    write_graphs(models, folder)
    return Findings(
        claims=tuple(entry for name, places in last.items() for entry in topology_claims(name, places, seed=seed)),
        sections={"Topology": _section(last)},
        figures=_draw(last, models, folder, seed=seed),
    )


def write_graphs(models: list[Mapping[str, Any]], folder: Path) -> None:
    """Write the concept graphs as `topology.json` and as the page `topology.html`."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"models": models}, separators=(",", ":"), allow_nan=False)
    (folder / JSON_FILE).write_text(text + "\n", encoding="utf-8")
    title = "The numbers as models of (a + b) mod p hold them"
    write_page(title, models, folder / PAGE_FILE)


def topology_claims(name: str, places: Mapping[str, Shown], *, seed: int) -> list[Claim]:
    """Return what was measured of a model's embedding, its last answer and its unembedding, each with its null.

    The verdict is by the null's p at a level of 0.01: nine measures of each model are looked at.
    """
    found: list[Claim] = []
    for place in claimed_places(places):
        shown = places[place]
        shape, key = shown.shape, f"topology.{name}.{place.replace(' ', '_')}"
        order, null, loops = shape.order, shape.null, shape.loops
        common = {"n": shown.held.modulus, "seed": seed}
        near = f"{place}: distances of all pairs and on the circle of frequency {order.frequency}, Pearson"
        steps = f"{place}: share of most similar numbers at the commonest step"
        loop = f"{place}: longest loop (H1) ÷ diameter; null: clouds of the same covariance"
        for measure, value, chance, p, about in (
            ("circularity", order.circularity, null.circularity, shape.circularity_p, near),
            ("step_agreement", order.agreement, null.agreement, shape.agreement_p, steps),
            ("longest_loop", loops.longest, loops.expected, loops.p, loop),
        ):
            found.append(Claim(f"{key}.{measure}", value, null=chance, verdict=_verdict(p), about=about, **common))
    return found


def claimed_places(places: Iterable[str]) -> list[str]:
    """Return the first place, the last of those of answers, and the last; the table of the section has them all."""
    names = list(places)
    answer = [name for name in names if name.endswith(ANSWER)][-1:]
    return list(dict.fromkeys([names[0], *answer, names[-1]]))


def _verdict(p: float) -> str:
    return f"above chance, p = {p:.2g}" if p <= LEVEL else f"no effect, p = {p:.2g}"


def _section(last: Mapping[str, Mapping[str, Shown]]) -> str:
    """What was found, place by place, as a table."""
    rows = [
        "| model | place | strongest frequency | its share | circularity | agreement of steps | longest loop | loops |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, places in last.items():
        for place, shown in places.items():
            order, null, loops = shown.shape.order, shown.shape.null, shown.shape.loops
            cells = [
                f"{name} | {place} | {order.frequency} (step {order.step})",
                f"{order.share:.2f} ({null.share:.2f})",
                f"{order.circularity:.2f} ({null.circularity:.2f})",
                f"{order.agreement:.2f} ({null.agreement:.2f})",
                f"{loops.longest:.2f} ({loops.expected:.2f})",
                str(loops.n_loops),
            ]
            rows.append(f"| {' | '.join(cells)} |")
    return "\n".join([SECTION, "", *rows])


def _draw(
    last: Mapping[str, Mapping[str, Shown]], models: list[Mapping[str, Any]], folder: Path, *, seed: int
) -> dict[str, str]:
    figures = folder / "figures"
    name = next(iter(last))
    embeddings = {each: next(iter(places.values())) for each, places in list(last.items())[:MOST_ROWS]}
    found = {
        "topology": picture.draw_graphs(figures / "topology.png", embeddings, seed=seed),
        "topology_3d": picture.draw_space(figures / "topology_3d.png", embeddings[name], name=name, seed=seed),
    }
    if any(len(model["checkpoints"]) > 1 for model in models):
        found["topology_course"] = picture.draw_course(figures / "topology_course.png", models)
    return {f"figures/{file}.png": caption for file, caption in found.items()}
