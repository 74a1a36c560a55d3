"""What untrained attention looks like: near even on average, and yet different for every input."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

import actdb

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Attention:
    """Of each head [layer, head], over prompts of one length n.

    `distance` is the greatest |mean weight − 1/n| over (query, key); `deviation` the standard deviation of a weight
    over prompts, mean over (query, key); `expected` the greatest distance that chance gives a head whose weights
    have the mean 1/n and that deviation (the mean greatest of as many normals, at the standard error of each mean).
    """

    distance: Floats
    deviation: Floats
    expected: Floats
    uniform: float
    n_prompts: int


def describe_attention(run: actdb.Run) -> Attention:
    """Describe the stored patterns of a run whose prompts have one length; raises `SelectionError` for several."""
    lengths = {len(run.tokens(prompt)) for prompt in range(run.n_prompts)}
    if len(lengths) > 1:
        raise actdb.SelectionError(f"run {run.name!r} has prompts of {min(lengths)} to {max(lengths)} tokens, not one")
    n = lengths.pop()
    total, squares, n_prompts = 0.0, 0.0, 0
    for block in run["pattern"].batches(256):
        squarely = np.stack(block.values).astype(np.float64)  # [prompt, layer, head, query, key]
        total, squares = total + squarely.sum(0), squares + (squarely**2).sum(0)
        n_prompts += len(squarely)
    mean = np.asarray(total) / n_prompts
    spread = np.sqrt(np.maximum(np.asarray(squares) / n_prompts - mean**2, 0))
    error = spread.mean((-2, -1)) / np.sqrt(n_prompts)
    largest = np.abs(np.random.default_rng(0).standard_normal((200, n * n))).max(1).mean()
    return Attention(
        distance=np.abs(mean - 1 / n).max((-2, -1)),
        deviation=spread.mean((-2, -1)),
        expected=error * largest,
        uniform=1 / n,
        n_prompts=n_prompts,
    )
