"""Features of the sparse autoencoder, read off single tokens, against categories and the head's attention."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from scipy import stats

from analyses.common.autoencoder import Autoencoder

LEAST_WORDS, MOST_SHARE = 3, 0.5
N_TOP = 8


@dataclass(frozen=True)
class FeatureComparison:
    """What features say of categories and of attention, each beside its mean over permutations of the tokens.

    `purity`: over features that fire on some and not on most words, the share of the words where each fires most that
    are of one category. `overlap`: cosine of the features of two words of one category minus that of two categories.
    `correlation`: Spearman's between that cosine and the head's score, over pairs of words.
    """

    n_features: int
    purity: float
    null_purity: float
    overlap: float
    null_overlap: float
    overlap_p: float
    correlation: float
    null_correlation: float
    correlation_p: float


def encode_tokens(model: Autoencoder, rows: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    """Return latents [token, latent] of stored rows [token, d_in]."""
    with torch.inference_mode():
        return np.asarray(model.encode(torch.from_numpy(np.asarray(rows, np.float32))).numpy())


def similarity(latents: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Return the cosine of each pair of tokens' latents [token, latent]: [token, token], 0 with a silent one."""
    lengths = np.maximum(np.linalg.norm(latents, axis=1, keepdims=True), 1e-12)
    return np.asarray((latents / lengths) @ (latents / lengths).T)


def compare_features(
    latents: npt.NDArray[np.float32],
    scores: npt.NDArray[Any],
    labels: npt.NDArray[np.int64],
    *,
    n_permutations: int,
    seed: int,
) -> FeatureComparison:
    """Compare the features [word, latent] of categorised words with their labels [word] and scores [query, key].

    The null permutes which word has which features (Mantel's test), which keeps how often each fires.
    """
    generator = np.random.default_rng((seed, 41))
    similar = similarity(latents)
    pairs = ~np.eye(len(labels), dtype=bool)
    same = labels[:, None] == labels[None]
    ranks = stats.rankdata(((scores + scores.T) / 2)[pairs])
    ranks = (ranks - ranks.mean()) / ranks.std()

    def overlap(values: npt.NDArray[Any]) -> float:
        return float(values[pairs & same].mean() - values[~same].mean())

    def correlation(values: npt.NDArray[Any]) -> float:
        order = stats.rankdata(values[pairs])
        spread = order.std()
        return float(((order - order.mean()) * ranks).mean() / spread) if spread else 0.0

    chosen = _selective(latents)
    null = []
    for _ in range(n_permutations):
        order = generator.permutation(len(labels))
        moved = similar[np.ix_(order, order)]
        null.append((_purity(chosen, labels[order]), overlap(moved), correlation(moved)))
    observed = (_purity(chosen, labels), overlap(similar), correlation(similar))
    means = np.nanmean(null, 0) if chosen.shape[1] else np.array([np.nan, *np.mean(null, 0)[1:]])
    p = [(1 + sum(draw[i] >= observed[i] for draw in null)) / (n_permutations + 1) for i in (1, 2)]
    return FeatureComparison(
        chosen.shape[1],
        observed[0],
        float(means[0]),
        observed[1],
        float(means[1]),
        p[0],
        observed[2],
        float(means[2]),
        p[1],
    )


def _selective(latents: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Features that fire on at least `LEAST_WORDS` words and not on most."""
    n_firing = (latents > 0).sum(0)
    return latents[:, (n_firing >= LEAST_WORDS) & (n_firing <= MOST_SHARE * len(latents))]


def _purity(latents: npt.NDArray[np.float32], labels: npt.NDArray[np.int64]) -> float:
    """Mean over features of the share of the commonest category among the words where each fires most."""
    shares = []
    for column in latents.T:
        top = np.argsort(-column, kind="stable")[:N_TOP]
        top = top[column[top] > 0]
        shares.append(np.bincount(labels[top]).max() / len(top))
    return float(np.mean(shares)) if shares else float("nan")
