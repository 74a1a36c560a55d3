"""Communities of tokens in a head's attention: a directed graph of each token's strongest keys, cut by Leiden."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import igraph
import leidenalg
import numpy as np
import numpy.typing as npt
from sklearn.metrics import adjusted_rand_score

Ints = npt.NDArray[np.int64]
N_EDGES = 4
MOST_TOKENS = 150
N_CENTRAL = 3


@dataclass(frozen=True)
class Communities:
    """A cut of a token graph: `member` [token] numbers communities from the largest, `modularity` says how well.

    `edges` [edge, 2] go from query to key, `weights` [edge] are attention without the token itself.
    """

    member: Ints
    modularity: float
    edges: Ints
    weights: npt.NDArray[np.float64]

    @property
    def sizes(self) -> Ints:
        """Tokens of each community."""
        return np.bincount(self.member)

    def central(self, community: int, n: int = N_CENTRAL) -> list[int]:
        """Return the tokens of a community that its other tokens attend to most, the most attended first."""
        inside = (self.member[self.edges] == community).all(1)
        strength = np.bincount(self.edges[inside, 1], self.weights[inside], len(self.member))
        members = np.flatnonzero(self.member == community)
        return [int(token) for token in members[np.argsort(-strength[members], kind="stable")[:n]]]


def strongest_edges(scores: npt.NDArray[Any], *, n_edges: int = N_EDGES) -> tuple[Ints, npt.NDArray[np.float64]]:
    """Return each row's `n_edges` strongest keys other than itself: edges [edge, 2] and softmax weights [edge]."""
    values = scores.astype(np.float64)
    np.fill_diagonal(values, -np.inf)
    keys = np.argpartition(-values, n_edges, axis=1)[:, :n_edges]
    top = values.max(1, keepdims=True)
    total = np.exp(values - top).sum(1, keepdims=True)
    weights = np.exp(np.take_along_axis(values, keys, 1) - top) / total
    queries = np.repeat(np.arange(len(values)), n_edges)
    return np.stack([queries, keys.ravel()], 1), weights.ravel()


def find_communities(scores: npt.NDArray[Any], *, seed: int, rewired: bool = False) -> Communities:
    """Cut the graph of strongest edges by modularity (Leiden; Traag, Waltman and van Eck 2019), sizes bounded.

    `rewired` keeps degrees and draws who is joined at random first: the null of the modularity.
    """
    edges, weights = strongest_edges(scores)
    graph = igraph.Graph(n=len(scores), edges=edges.tolist(), directed=True)
    if rewired:
        generator = np.random.default_rng((seed, 31))
        edges = np.stack([edges[:, 0], generator.permutation(edges[:, 1])], 1)
        graph = igraph.Graph(n=len(scores), edges=edges.tolist(), directed=True)
    graph.es["weight"] = weights.tolist()
    found = leidenalg.find_partition(
        graph,
        leidenalg.ModularityVertexPartition,
        weights="weight",
        n_iterations=-1,
        max_comm_size=min(MOST_TOKENS, max(len(scores) // 4, 1)),
        seed=seed,
    )
    return Communities(np.array(found.membership, np.int64), float(found.modularity), edges, weights)


def agreement(member: Sequence[int] | Ints, labels: Ints) -> float:
    """Return the adjusted Rand index of communities and categories over categorised tokens: 0 by chance, 1 equal."""
    known = labels >= 0
    return float(adjusted_rand_score(labels[known], np.asarray(member)[known])) if known.any() else float("nan")


@dataclass(frozen=True)
class Clustering:
    """Communities with their `agreement` with the categories."""

    communities: Communities
    agreement: float


def cluster(scores: npt.NDArray[Any], labels: Ints, *, seed: int) -> Clustering:
    """Cut the graph of scores [query, key] and hold it to the categories, `labels` [token]."""
    found = find_communities(scores, seed=seed)
    return Clustering(found, agreement(found.member, labels))


def lay_out(found: Communities, tokens: Ints, *, seed: int) -> npt.NDArray[np.float64]:
    """Place some tokens in the plane by the edges between them (Fruchterman and Reingold): [token, 2]."""
    places = np.full(len(found.member), -1)
    places[tokens] = np.arange(len(tokens))
    inside = (places[found.edges] >= 0).all(1)
    graph = igraph.Graph(n=len(tokens), edges=places[found.edges[inside]].tolist())
    start = np.random.default_rng((seed, 32)).standard_normal((len(tokens), 2))
    return np.array(graph.layout_fruchterman_reingold(seed=start.tolist(), niter=400).coords)
