"""The attention page: every head on one prompt in one HTML file, to be explored by pointing at tokens."""

from base64 import b64encode
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from actdb.errors import SelectionError
from actdb.plots.attention import PATTERN, read_heads
from actdb.plots.picture import colour_table, fill_page
from actdb.plots.style import COLOURS, run_title, visible

if TYPE_CHECKING:
    from actdb.database import Database
    from actdb.run import Run

STEPS = 255
"""Weights on a page are multiples of 1 / 255: one byte each."""
MAX_BYTES = 2**25


def attention_page(
    db: "Database",
    prompt: int,
    *,
    layer: int | None = None,
    head: int | Sequence[int] | None = None,
    run: str | None = None,
) -> str:
    """Return an HTML page of the attention of a prompt's tokens to one another, of all heads or of those given.

    Pointing at a token shows what it attends to, or what attends to it; each head is chosen by its picture. The page
    is one file without any reference to another, weights rounded to 1/255, 4/3 bytes each and half of that where
    causal. Raises as `pattern` does, and `SelectionError` beyond 32 MiB of weights, saying what to choose.
    """
    chosen = db.run(run)
    _check_size(chosen, prompt, layer=layer, head=head)
    found = read_heads(chosen, prompt, layer=layer, head=head)
    causal = chosen.info.causal and len(found.queries) == len(found.tokens)
    title = f"{run_title(chosen)}: attention on prompt {prompt}"
    data = {
        "title": title,
        "tokens": [visible(token) for token in found.tokens],
        "breaks": [token.endswith("\n") for token in found.tokens],
        "queries": list(found.queries),
        "causal": causal,
        "steps": STEPS,
        "colours": colour_table(COLOURS),
        "heads": [
            {"layer": layer, "head": head, "weights": _packed(weights, causal=causal)}
            for layer, planes in zip(found.layers, found.weights, strict=True)
            for head, weights in zip(found.heads, planes, strict=True)
        ],
    }
    return fill_page("attention.html", title, data)


def _check_size(run: "Run", prompt: int, *, layer: Any, head: Any) -> None:
    """Refuse what makes too long a page, before anything is read."""
    if PATTERN not in run:
        return  # `read_heads` says what is missing
    selection = run[PATTERN].sel(prompt=prompt)
    n_layers, n_heads, n_queries, n_keys = selection.shape
    n_heads = n_heads if head is None else np.size(head)
    size = (1 if layer is not None else n_layers) * n_heads * n_queries * n_keys // (2 if run.info.causal else 1)
    if size > MAX_BYTES:
        raise SelectionError(
            f"a page of prompt {prompt} has {size / 2**20:.0f} MiB of weights, more than {MAX_BYTES // 2**20}:"
            " choose a layer, a head or a shorter prompt"
        )


def _packed(weights: npt.NDArray[Any], *, causal: bool) -> str:
    """Return weights [query, key] as bytes in base64: row after row, those of causal patterns up to the diagonal."""
    steps = np.rint(np.clip(np.asarray(weights, np.float32), 0, 1) * STEPS).astype(np.uint8)
    chosen = steps[np.tril_indices(len(steps))] if causal else steps.reshape(-1)
    return b64encode(chosen.tobytes()).decode()
