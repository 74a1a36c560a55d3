"""Steps 4 to 6 for one model: path patching, faithfulness of concepts, and the minimal circuit."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from analyses.common.program import note
from analyses.common.report import Claim
from analyses.modular_arithmetic import circuit_claims as claiming
from analyses.modular_arithmetic import circuit_picture as picture
from analyses.modular_arithmetic.component import MLP
from analyses.modular_arithmetic.discovery import Circuit, find_circuit, importances, write_circuit
from analyses.modular_arithmetic.faithfulness import Substitution
from analyses.modular_arithmetic.finding import Findings, join
from analyses.modular_arithmetic.grid import Grid, corruption
from analyses.modular_arithmetic.neighbourhood import CLOSE, DISTANT, Moved, patch_neighbours
from analyses.modular_arithmetic.path import PathEffect, patch_components, path_effects
from analyses.modular_arithmetic.state import read_states, split_pairs
from analyses.modular_arithmetic.wiring import Wiring

STATES = ("resid_mid", "resid_post")
SOURCE = "random"
"""The corruption of path patching: any pair with another answer, so that a and b both change."""


def study_circuit(grid: Grid, *, folder: Path, seed: int, name: str) -> Findings:
    """Do steps 4 to 6 on a trained model: keys of claims begin with `name`, figures are written to `folder`.

    Writes `circuit_<name>.json` there too. Costs some hundred forward passes of all pairs.
    """
    note(f"{name}: path patching and circuit")
    circuits = _study_edges(grid, folder=folder, seed=seed, name=name)
    note(f"{name}: faithfulness of concepts")
    return join((circuits, _study_faithfulness(grid, folder=folder, seed=seed, name=name)))


def _study_edges(grid: Grid, *, folder: Path, seed: int, name: str) -> Findings:
    wiring = Wiring(grid)
    source = corruption(grid, SOURCE, seed=seed)
    effects, importance = list(path_effects(grid, source)), importances(grid)
    circuit = find_circuit(wiring, effects, seed=seed)
    write_circuit(folder / f"circuit_{name}.json", circuit, wiring, effects, importance)
    same = patch_components(grid, corruption(grid, "same answer", seed=seed))
    layers = [node.name for node in wiring.nodes if node.kind == MLP]
    claims = [
        *claiming.path_claims(effects, seed=seed),
        *claiming.answer_claims(same, patch_components(grid, source), names=layers, seed=seed),
        *claiming.circuit_claims(circuit, grid, seed=seed),
    ]
    files = {kind: f"{kind}_{name}.png" for kind in ("circuit", "paths", "pruning")}
    title = f"{grid.run.name}: {{}}"
    captions = (
        picture.draw_circuit(
            folder / files["circuit"], circuit, wiring.nodes, effects, importance, title=title.format("minimal circuit")
        ),
        picture.draw_effects(folder / files["paths"], effects, wiring.nodes, title=title.format("path patching")),
        picture.draw_pruning(
            folder / files["pruning"], circuit, chance=1 / grid.modulus, title=title.format("is the circuit enough?")
        ),
    )
    figures = {f"{folder.name}/{file}": caption for file, caption in zip(files.values(), captions, strict=True)}
    return Findings(_named(name, claims), {f"Circuit of {name}": _describe(circuit, effects)}, figures)


def _study_faithfulness(grid: Grid, *, folder: Path, seed: int, name: str) -> Findings:
    fitted = split_pairs(grid.modulus, seed=seed)
    claims: list[Claim] = []
    curves, moves = {}, {}
    for state in read_states(grid, STATES):
        substitution = Substitution(grid, state, fitted, seed)
        curves[state.name] = substitution.curve
        claims += claiming.faithfulness_claims(substitution)
        moves[state.name] = patch_neighbours(grid, state, seed=seed)
        claims += claiming.neighbour_claims(state.name, moves[state.name], seed=seed)
    files = f"substitution_{name}.png", f"neighbours_{name}.png"
    captions = (
        picture.draw_curves(folder / files[0], curves, title=f"{grid.run.name}: principal components put back"),
        picture.draw_neighbours(folder / files[1], moves, title=f"{grid.run.name}: patches from near and far"),
    )
    figures = {f"{folder.name}/{file}": caption for file, caption in zip(files, captions, strict=True)}
    return Findings(_named(name, claims), {f"Close and distant patches in {name}": _compare(moves)}, figures)


def _named(name: str, claims: Iterable[Claim]) -> tuple[Claim, ...]:
    return tuple(replace(entry, key=f"{name}.{entry.key}".replace(" ", "_")) for entry in claims)


def _describe(circuit: Circuit, effects: Sequence[PathEffect]) -> str:
    """The circuit in words, with the direct effect of each edge."""
    components = ", ".join(circuit.components)
    direct = {(effect.sender, effect.receiver): effect.direct.accuracy_lost.value for effect in effects}
    edges = "; ".join(f"{sender} → {receiver} ({direct[sender, receiver]:.2f})" for sender, receiver in circuit.edges)
    return (
        f"{len(circuit.edges)} of {circuit.n_edges} edges, through {components}, keep an accuracy of "
        f"{circuit.accuracy:.4f} (the model: {circuit.whole:.4f}) with everything else at its mean; no single one can "
        f"go. All other edges alone have {circuit.rest:.4f}. Edges, with the accuracy lost by patching each: {edges}."
    )


def _compare(moves: dict[str, list[Moved]]) -> str:
    """What the patches say of the claim that close ones cost 5 % and distant ones 40 %."""
    lines = []
    for state, moved in moves.items():
        found = {entry.source: entry for entry in moved}
        near, far = found[CLOSE], found[DISTANT]
        lines.append(
            f"{state}: accuracy lost {near.lost.value:.3f} from the next number, {far.lost.value:.3f} from the "
            f"opposite one; logits moved {near.distance.value:.2f} and {far.distance.value:.2f} of the mean distance."
        )
    return "Claimed: 0.05 and 0.40. " + " ".join(lines)
