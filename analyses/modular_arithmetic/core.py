"""Steps 1 to 3 of one model: its frequencies, its progress through training, and what its components are worth."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt

import actdb
from analyses.common.report import Claim
from analyses.modular_arithmetic import ablation, picture
from analyses.modular_arithmetic import claims as claiming
from analyses.modular_arithmetic.finding import Findings
from analyses.modular_arithmetic.fourier import NeuronSpectrum, Spectrum, circularity, neuron_spectrum
from analyses.modular_arithmetic.grid import Grid
from analyses.modular_arithmetic.model import number_embedding, restore
from analyses.modular_arithmetic.progress import Measures, Phases, follow, phases, read_predictions
from analyses.modular_arithmetic.progress_claims import progress_claims
from analyses.modular_arithmetic.training import Trained


@dataclass(frozen=True)
class Core:
    """One model's steps 1 to 3, each done when asked for.

    `runs` are its checkpoints in the order of training; `trained` its training where it is known. Figures go to
    `folder`; their names and the claims' keys begin with `prefix`. `claimed` and `gold` are falls of the accuracy under
    mean ablation that are stated of it.
    """

    db: actdb.Database
    name: str
    runs: Sequence[str]
    folder: Path
    seed: int
    trained: Trained | None = None
    prefix: str = ""
    claimed: Mapping[str, float] = field(default_factory=dict)
    gold: Mapping[str, float] = field(default_factory=dict)

    @cached_property
    def _followed(self) -> tuple[Spectrum, list[Measures]]:
        return follow(self.db, self.runs, seed=self.seed)

    @property
    def spectrum(self) -> Spectrum:
        """The last checkpoint's spectrum."""
        return self._followed[0]

    @property
    def measures(self) -> list[Measures]:
        """The progress measures of every checkpoint."""
        return self._followed[1]

    @cached_property
    def phases(self) -> Phases:
        """The epochs at which its phases end."""
        return phases(self.measures)

    @cached_property
    def last(self) -> actdb.Run:
        """The run of the last checkpoint."""
        return self.db.run(self.runs[-1])

    @property
    def modulus(self) -> int:
        """The modulus p."""
        return int(self.last.weight("W_U").shape[1])

    @cached_property
    def grid(self) -> Grid:
        """The last checkpoint as a model that runs, beside its run."""
        model = restore(self.last)
        return Grid(model, self.last, model.modulus, read_predictions(self.last).is_trained)

    def frequencies(self) -> Findings:
        """Step 1: the Fourier spectrum of the embedding, its circles, the neurons' best frequencies."""
        embedding = number_embedding(self.last)
        first = self.db.run(self.runs[0]) if len(self.runs) > 1 else None
        found = claiming.Fourier(
            self.spectrum,
            [circularity(embedding, key, seed=self.seed) for key in self.spectrum.keys],
            _neurons(self.last),
            {} if first is None else _neurons(first),
        )
        figures: dict[str, str] = {}
        if self.spectrum.keys:
            title = f"The embedding of {self.name}"
            path = self._path("circles")
            figures |= self._figure("circles", picture.draw_circles(path, embedding, self.spectrum.keys, title=title))
        for layer, neurons in found.neurons.items():
            name = "neurons" if len(found.neurons) == 1 else f"neurons_{layer}"
            before = found.initial.get(layer)
            grid = read_neurons(self.last, layer)
            title = f"Neurons of layer {layer} of {self.name}"
            caption = picture.draw_neurons(self._path(name), grid, neurons, before, title=title)
            figures |= self._figure(name, caption)
        return self._findings(claiming.fourier_claims(found, seed=self.seed), figures)

    def progress(self) -> Findings:
        """Step 2: losses and progress measures of every checkpoint."""
        trained = read_predictions(self.last).is_trained
        n_pairs = int(trained.sum()), int((~trained).sum())
        entries = progress_claims(self.measures, self.phases, n_pairs=n_pairs, seed=self.seed)
        figures = {}
        if len(self.runs) > 1:
            path, title = self._path("progress"), f"{self.name} through training"
            caption = picture.draw_progress(path, self.trained, self.measures, self.phases, title=title)
            figures = self._figure("progress", caption)
        return self._findings(entries, figures)

    def intervene(self) -> Findings:
        """Step 3: ablation and patching of each component, and of the embedding's directions."""
        effects = {**ablation.ablate(self.grid), **ablation.patch(self.grid, seed=self.seed)}
        keys = self.spectrum.keys
        directions = ablation.ablate_directions(self.grid, keys, seed=self.seed) if keys else None
        entries = claiming.ablation_claims(effects, seed=self.seed, claimed=self.claimed, gold=self.gold)
        if directions is not None:
            entries += claiming.direction_claims(directions, seed=self.seed)
        path, title = self._path("ablation"), f"{self.name} without its parts"
        caption = picture.draw_ablation(path, effects, directions, title=title)
        return self._findings(entries, self._figure("ablation", caption))

    def _findings(self, entries: Sequence[Claim], figures: Mapping[str, str]) -> Findings:
        return Findings(claiming.prefixed(self.prefix, entries) if self.prefix else entries, figures=figures)

    def _path(self, name: str) -> Path:
        return self.folder / "figures" / self._file(name)

    def _figure(self, name: str, caption: str) -> dict[str, str]:
        return {f"figures/{self._file(name)}": caption}

    def _file(self, name: str) -> str:
        return f"{self.prefix}_{name}.png" if self.prefix else f"{name}.png"


def read_neurons(run: actdb.Run, layer: int) -> npt.NDArray[np.float32]:
    """Read the neurons of a layer over the grid [p², neuron]: where the answer is read, or the mean over positions."""
    neurons = run["mlp_post"].sel(layer=layer)
    if run.info.causal:
        return np.asarray(neurons.sel(pos=-1).numpy(), np.float32)
    return np.asarray(np.mean([neurons.sel(pos=pos).numpy() for pos in range(len(run.tokens(0)))], axis=0), np.float32)


def _neurons(run: actdb.Run) -> dict[int, NeuronSpectrum]:
    if "mlp_post" not in run:
        return {}
    modulus = round(run.n_prompts**0.5)
    return {layer: neuron_spectrum(read_neurons(run, layer), modulus) for layer in run.layers}
