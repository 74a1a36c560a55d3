"""Models trained elsewhere: state dicts with TransformerLens' names, of one checkpoint or of a whole training.

Read are `.safetensors`, PyTorch files (tensors and plain values alone: nothing else is unpickled), folders of such
files with the step in each name, and folders that `actdb harvest` reads. Neurons are taken to be ReLUs. Both layouts
of the names are understood: today's (`embed.W_E` [token, d_model], `blocks.0.attn.W_Q` [head, d_model, d_head]) and
that of the first published grokked models (`embed.W_E` [d_model, token], `blocks.0.attn.W_Q` [head, d_head,
d_model], `W_O` [d_model, head · d_head]).
"""

import pickle
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

import actdb
from analyses.modular_arithmetic.model import ModularTransformer, Shape, answers, pair_ids
from analyses.modular_arithmetic.training import SITES, TEST, TRAIN

State = Mapping[str, torch.Tensor]
SUFFIXES = (".safetensors", ".pt", ".pth")
MODELS, EPOCHS = ("checkpoints", "state_dicts"), ("checkpoint_epochs", "epochs")
CONFIGURATION = "transformer_lens.HookedTransformerConfig.HookedTransformerConfig"
IGNORED = (".mask", ".IGNORE")
STEP = re.compile(r"(\d+)$")


@dataclass(frozen=True)
class Checkpoint:
    """The weights of one step (None: not known), in today's layout."""

    step: int | None
    weights: State


@dataclass(frozen=True)
class Published:
    """A model read from files: its shape, modulus, checkpoints by step, and the pairs trained on (None: not known)."""

    name: str
    shape: Shape
    modulus: int
    checkpoints: tuple[Checkpoint, ...]
    trained: tuple[int, ...] | None = None

    def model(self, checkpoint: Checkpoint) -> ModularTransformer:
        """Return the model at a checkpoint; raises `ModelError` for weights that do not fit."""
        made = ModularTransformer(self.shape, self.modulus, seed=0, name=self.name)
        made.load_state_dict({name: self._given(checkpoint, name, value) for name, value in made.state_dict().items()})
        return made.eval()

    def _given(self, checkpoint: Checkpoint, name: str, own: torch.Tensor) -> torch.Tensor:
        """A weight as the checkpoint has it; biases that it does not have are 0, outputs beyond p are left out."""
        if name not in checkpoint.weights:
            if ".b_" in name:
                return torch.zeros_like(own)
            raise actdb.ModelError(f"{self.name} has no weight {name}; it has {', '.join(sorted(checkpoint.weights))}")
        given = checkpoint.weights[name]
        if name.startswith("unembed."):
            given = given[..., : self.modulus]
        if given.shape != own.shape:
            raise actdb.ModelError(f"{self.name}: {name} is {list(given.shape)}, not {list(own.shape)}")
        return given


def read_published(path: Path) -> Published:
    """Read a file or folder of weights; raises `ModelError` for one that holds no model of this kind.

    The modulus is the number of tokens, less the token `=` where prompts have three positions.
    """
    found, trained = _read(path)
    if not found:
        raise actdb.ModelError(f"{path} holds no weights: a {', '.join(SUFFIXES)} file, or a folder of them, is needed")
    checkpoints = tuple(Checkpoint(step, _today(weights, path)) for step, weights in found)
    weights = checkpoints[-1].weights
    shape = _shape(weights, path)
    n_tokens = len(weights["embed.W_E"])
    modulus = n_tokens - 1 if shape.equals else n_tokens
    return Published(path.stem if path.is_file() else path.resolve().name, shape, modulus, checkpoints, trained)


def harvest_published(published: Published, db: Path, *, run: str | None = None) -> tuple[str, ...]:
    """Harvest every checkpoint over the whole grid; returns the runs in the order of the steps.

    Where the file does not say which pairs were trained on, all count as such.
    """
    p = published.modulus
    ids, right = pair_ids(p, equals=published.shape.equals), answers(p)
    trained = np.ones(p * p, np.bool_)
    if published.trained is not None:
        trained = np.isin(np.arange(p * p), published.trained)
    prompts = [
        {"tokens": row.tolist(), "a": int(row[0]), "b": int(row[1]), "answer": int(c), "split": TRAIN if t else TEST}
        for row, c, t in zip(ids, right, trained, strict=True)
    ]
    base, names = run or published.name, []
    for checkpoint in published.checkpoints:
        name = base if checkpoint.step is None else f"{base}-step{checkpoint.step}"
        model = published.model(checkpoint)
        actdb.harvest(model, prompts, out=db, run=name, step=checkpoint.step, sites=SITES, stats=(), store="float32")
        names.append(name)
    return tuple(names)


def _read(path: Path) -> tuple[list[tuple[int | None, State]], tuple[int, ...] | None]:
    """The state dicts of a path by step, and the pairs trained on where it says."""
    if path.is_dir():
        files = sorted((f for f in path.iterdir() if f.suffix in SUFFIXES), key=lambda f: (_step(f) or 0, f.name))
        if (path / "config.json").is_file():
            return [(None, _bridge_weights(path))], None
        return [(_step(file), state) for file in files for _, state in _read(file)[0]], None
    if not path.is_file():
        raise actdb.ModelError(f"{path}: no such file or folder")
    if path.suffix == ".safetensors":
        try:
            return [(_step(path), load_file(path))], None
        except SafetensorError as exc:
            raise actdb.ModelError(f"{path} is no readable safetensors file: {exc}") from exc
    return _unpack(_unpickle(path), path)


def _unpickle(path: Path) -> Any:
    """Read a PyTorch file; of classes, only a stand-in for transformer-lens' configuration is made, and not used."""
    try:
        with torch.serialization.safe_globals([(_Configuration, CONFIGURATION)]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError) as exc:
        first = str(exc).partition("\n")[0]
        raise actdb.ModelError(
            f"{path} holds more than tensors and plain values, or is no PyTorch file ({first}); save "
            "model.state_dict() alone, as .safetensors or by torch.save"
        ) from exc


class _Configuration:
    """Stands for a configuration object in a file, whose fields are not read: the weights tell the shape."""


def _unpack(held: Any, path: Path) -> tuple[list[tuple[int | None, State]], tuple[int, ...] | None]:
    """Find the state dicts in what a file held: one, or a list with the epochs beside it."""
    if not isinstance(held, Mapping):
        raise actdb.ModelError(f"{path} holds a {type(held).__name__}, not a state dict")
    if "embed.W_E" in held:
        return [(_step(path), held)], None
    indices = held.get("train_indices")
    trained = None if indices is None else tuple(int(i) for i in torch.as_tensor(indices).flatten())
    states = next((held[key] for key in MODELS if held.get(key)), None)
    epochs = next((held[key] for key in EPOCHS if held.get(key) is not None), None)
    if isinstance(states, Sequence) and epochs is not None and len(epochs) == len(states):
        return [(int(epoch), state) for epoch, state in zip(epochs, states, strict=True)], trained
    for key in ("model", "state_dict"):
        if isinstance(held.get(key), Mapping) and "embed.W_E" in held[key]:
            return [(_step(path), held[key])], trained
    raise actdb.ModelError(f"{path} holds no state dict with embed.W_E; it has {', '.join(map(str, held))}")


def _bridge_weights(folder: Path) -> State:
    """The weights of a folder that `actdb` loads, under TransformerLens' names."""
    model = actdb.load_model(folder)
    if model.cfg.act_fn != "relu":
        raise actdb.ModelError(f"{folder}: its neurons are {model.cfg.act_fn}; this analysis has ReLUs")
    return {name: tensor.detach() for name, tensor in model.tl_named_parameters()}


def _today(weights: State, path: Path) -> State:
    """Return weights in today's layout, float32, without masks; raises `ModelError` where names are missing."""
    needed = ("embed.W_E", "pos_embed.W_pos", "unembed.W_U", "blocks.0.attn.W_Q", "blocks.0.mlp.W_in")
    if missing := [name for name in needed if name not in weights]:
        raise actdb.ModelError(f"{path} has no {', '.join(missing)}; it has {', '.join(sorted(weights))}")
    kept = {name: value.float() for name, value in weights.items() if not name.endswith(IGNORED)}
    d_model = kept["pos_embed.W_pos"].shape[1]
    if _is_today(kept["embed.W_E"], kept["blocks.0.mlp.W_in"], d_model):
        return kept
    turned = dict(kept)
    for name, value in kept.items():
        kind = name.rpartition(".")[2]
        if kind in ("W_E", "W_in", "W_out"):
            turned[name] = value.T
        elif kind in ("W_Q", "W_K", "W_V"):
            turned[name] = value.transpose(1, 2)  # [head, d_head, d_model] → [head, d_model, d_head]
        elif kind == "W_O":
            n_heads = len(kept[name.replace("W_O", "W_Q")])
            turned[name] = value.T.reshape(n_heads, -1, d_model)  # [d_model, head · d_head] → [head, d_head, d_model]
    return turned


def _shape(weights: State, path: Path) -> Shape:
    """The shape that weights in today's layout have; raises `ModelError` for one that is not that of this analysis."""
    layers = {int(name.split(".")[1]) for name in weights if name.startswith("blocks.")}
    n_heads, d_model, d_head = weights["blocks.0.attn.W_Q"].shape
    n_positions = len(weights["pos_embed.W_pos"])
    if n_positions not in (2, 3) or n_heads * d_head != d_model:
        raise actdb.ModelError(
            f"{path}: {n_positions} positions, {n_heads} heads of {d_head} in {d_model}; needed are prompts `a b =` or "
            "`a b`, and heads that fill d_model"
        )
    return Shape(
        "one-layer",
        n_layers=len(layers),
        d_model=d_model,
        n_heads=n_heads,
        d_mlp=weights["blocks.0.mlp.W_in"].shape[1],
        norm="ln_final.w" in weights,
        equals=n_positions == 3,
        biases=True,
    )


def _is_today(embedding: torch.Tensor, neurons: torch.Tensor, d_model: int) -> bool:
    """Whether W_E is [token, d_model]; where both are alike, whether W_in is [d_model, d_mlp]."""
    n_rows, n_columns = embedding.shape
    return n_columns == d_model and (n_rows != d_model or neurons.shape[0] == d_model)


def _step(path: Path) -> int | None:
    found = STEP.search(path.stem)
    return int(found[1]) if found else None
