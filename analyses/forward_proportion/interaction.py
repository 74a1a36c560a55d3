"""Fingerprints and interaction graphs of heads, from stored z and patterns and the run's own weights.

I[A → B] = Σ_s pattern_B[q, s] · ‖z_A[s] W_O^A‖ for heads A below B: how much of what A wrote, B's query q looks at. All
pairs of heads of a block of prompts are one matrix product; lengths ‖z W_O‖ come from the Gram matrix of W_O, which is
d_head wide. Memory is one block of prompts.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

import actdb

Floats = npt.NDArray[np.float32]
SITE = "interaction"
DIMS = ("layer", "head", "prompt", "target")
QUERIES = ("last", "mean")
BLOCK_TOKENS = 4096


def output_grams(run: actdb.Run) -> Floats:
    """Return W_O W_Oᵀ of every head: [layer, head, d_head, d_head]."""
    grams = []
    for layer in run["z"].layers:
        weight = np.asarray(run.weight("W_O", layer=layer), np.float32)  # [head, d_head, d_model]
        grams.append(weight @ weight.transpose(0, 2, 1))
    return np.stack(grams)


def lengths_of(z: npt.NDArray[Any], gram: Floats) -> Floats:
    """Return ‖z W_O‖ [head, row] of z [head, row, d_head]."""
    wide = np.asarray(z, np.float32)
    return np.asarray(np.sqrt(np.maximum(((wide @ gram) * wide).sum(-1), 0)), np.float32)


def fingerprints(run: actdb.Run, prompts: Sequence[int], *, query: str = "last") -> Floats:
    """Return f[p, h] = ‖z_h W_O^h‖ [prompt, layer · head] at the last token, or its mean over positions.

    Step 1. Costs one read of the last rows of z, or of all of them, a block of prompts at a time.
    """
    check_query(query)
    grams = output_grams(run)
    out = np.empty((len(prompts), grams.shape[0] * grams.shape[1]), np.float32)
    for places, block in prompt_blocks(run, prompts):
        by_layer = []
        for layer, gram in zip(run["z"].layers, grams, strict=True):
            chosen = run["z"].sel(layer=layer, prompt=block)
            if query == "last":
                by_layer.append(lengths_of(chosen.sel(pos=-1).numpy(), gram))
            else:
                means = _by_prompt(lengths_of(chosen.numpy(), gram), chosen.prompt, block).sum(-1)
                by_layer.append(means / np.array([len(run.tokens(prompt)) for prompt in block]))
        out[places] = np.concatenate(by_layer).T  # [layer · head, prompt] → [prompt, layer · head]
    return out


def interaction_blocks(
    run: actdb.Run, *, query: str = "last", block_tokens: int = BLOCK_TOKENS
) -> Iterator[actdb.Block]:
    """Yield I [layer, head, prompt, layer · head] of all stored prompts, in stored order; 0 unless A is below B.

    Step 3. `query` is the last token, or the mean over all. Costs one read of z and pattern and, a prompt of n tokens,
    2 · heads² · n multiplications (last) or heads · n² more (mean).
    """
    check_query(query)
    grams = output_grams(run)
    n_layers, n_heads = grams.shape[:2]
    layer_of = np.repeat(np.arange(n_layers), n_heads)
    below = layer_of[:, None] < layer_of  # [source, target]
    for _, block in prompt_blocks(run, run.prompt_ids(order="stored"), block_tokens=block_tokens):
        written, read = [], []
        for layer, gram in zip(run["z"].layers, grams, strict=True):
            chosen = run["z"].sel(layer=layer, prompt=block)
            written.append(_by_prompt(lengths_of(chosen.numpy(), gram), chosen.prompt, block))
            read.append(_attention(run, layer, block, query))
        source, target = np.concatenate(written), np.concatenate(read)  # [layer · head, prompt, key]
        values = source.transpose(1, 0, 2) @ target.transpose(1, 2, 0)  # [prompt, source, target]
        values = np.where(below, values, np.float32(0)).transpose(1, 0, 2)
        yield actdb.Block(values.reshape(n_layers, n_heads, len(block), -1), np.array(block))


def store_interactions(run: actdb.Run, *, query: str = "last") -> None:
    """Add the site `interaction` to a run, unless it is there; SQL reads it by `interaction(...)`. Needs `mode="a"`."""
    if SITE not in run:
        run.add_site(SITE, dims=DIMS, blocks=interaction_blocks(run, query=query))


def read_interactions(run: actdb.Run, *, rows: int = 512) -> Iterator[tuple[npt.NDArray[np.int64], Floats]]:
    """Yield ids [prompt] and I [prompt, source, target] of all prompts, in stored order and blocks of `rows`."""
    for block in run[SITE].batches(rows):
        n_layers, n_heads, n_prompts, n_targets = block.values.shape
        values = block.values.reshape(n_layers * n_heads, n_prompts, n_targets).transpose(1, 0, 2)
        yield block.prompt, np.asarray(values, np.float32)


def prompt_blocks(
    run: actdb.Run, prompts: Sequence[int], *, block_tokens: int = BLOCK_TOKENS
) -> Iterator[tuple[slice, list[int]]]:
    """Cut prompts, in their order, into blocks of at most so many tokens with their pads; with their places."""
    ids = [int(prompt) for prompt in prompts]
    n_tokens = run.prompt_index.n_tokens
    begin, longest = 0, 0
    for end, prompt in enumerate(ids):
        longest = max(longest, int(n_tokens[prompt]))
        if end > begin and longest * (end + 1 - begin) > block_tokens:
            yield slice(begin, end), ids[begin:end]
            begin, longest = end, int(n_tokens[prompt])
    if begin < len(ids):
        yield slice(begin, len(ids)), ids[begin:]


def check_query(query: str) -> None:
    """Raise `SettingError` for an unknown way of taking queries."""
    if query not in QUERIES:
        raise actdb.SettingError(f"query {query!r}: choose one of {', '.join(QUERIES)}")


def _by_prompt(values: Floats, prompt: npt.NDArray[np.int64], block: Sequence[int]) -> Floats:
    """Lay rows [head, row], prompt after prompt, out as [head, prompt, pos], 0 beyond each prompt."""
    counts = np.array([np.count_nonzero(prompt == one) for one in block]) if len(block) else np.zeros(0, np.int64)
    out = np.zeros((len(values), len(block), int(counts.max())), np.float32)
    owner = np.repeat(np.arange(len(block)), counts)
    pos = np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)
    out[:, owner, pos] = values
    return out


def _attention(run: actdb.Run, layer: int, block: Sequence[int], query: str) -> Floats:
    """Return the attention of the query, or mean query, of every head: [head, prompt, key], 0 beyond each prompt."""
    chosen = run["pattern"].sel(layer=layer, prompt=block)
    if query == "last":
        return np.nan_to_num(np.asarray(chosen.sel(pos=-1).numpy(pad=True), np.float32), copy=False)
    squares = np.nan_to_num(np.asarray(chosen.numpy(pad=True), np.float32), copy=False)  # [head, prompt, query, key]
    n_tokens = np.array([len(run.tokens(prompt)) for prompt in block], np.float32)
    return np.asarray(squares.sum(2) / n_tokens[:, None], np.float32)
