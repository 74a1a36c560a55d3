"""The whole study of one head: harvests, the steps of the specification, claims and figures."""

from collections.abc import Mapping
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

import actdb
from analyses.common.autoencoder import Trained, explained_variance, train_autoencoder
from analyses.common.program import note
from analyses.common.report import Claim
from analyses.semantic_head import claims as claiming
from analyses.semantic_head import picture
from analyses.semantic_head.attention import (
    SelfAttention,
    Suppression,
    attention_by_cosine,
    scale_first,
    scale_negative,
    self_suppression,
)
from analyses.semantic_head.behaviour import Change, read_behaviour
from analyses.semantic_head.category import Categories
from analyses.semantic_head.circuit import Circuit, TokenScores, random_circuit, read_circuit, token_scores
from analyses.semantic_head.community import cluster, find_communities
from analyses.semantic_head.feature import compare_features, encode_tokens, similarity
from analyses.semantic_head.reference import Reference
from analyses.semantic_head.score import (
    PermutationNull,
    Ranked,
    permute_categories,
    rank_heads,
    score_heads,
    store_scores,
)
from analyses.semantic_head.subject import RATES, RESIDUAL, Head, Subject, choose_vocabulary

PROGRAMME = "semantic_head"
N_DRAWN_CONTROLS = 5
N_CLUSTERED_CONTROLS = 3
MOST_LATENTS, LATENTS_A_DIMENSION = 4096, 4
ACTIVE_SHARE, LEAST_ACTIVE, MOST_ACTIVE = 24, 4, 32
"""One latent in so many dimensions is active, within bounds."""
HELD_OUT = 8
"""Every so many-th text is kept from the autoencoder."""
Floats = npt.NDArray[Any]
Name = TypeVar("Name", int, float)


def rank_all(subject: Subject) -> list[Ranked]:
    """Step 1: harvest the patterns of all heads, score them in one pass, store the table, rank them by SQL."""
    note(f"{subject.name}: patterns of all heads on random words ({subject.categories.kind})")
    run = subject.harvest_words()
    store_scores(subject.db, run, subject.categories, subject.labels, seed=subject.seed)
    with actdb.open(subject.db) as db:
        return rank_heads(db, run.name)


class HeadStudy:
    """The steps of one head's study; `all` runs them in order."""

    def __init__(
        self, head: Head, ranked: list[Ranked], *, reference: Reference, figures: Path, n_chosen_from: int
    ) -> None:
        self.head, self.subject, self.ranked = head, head.subject, ranked
        self.reference, self.folder, self.n_chosen_from = reference, figures, n_chosen_from
        self.extent, self.seed = head.subject.extent, head.subject.seed
        self.figures: dict[str, str] = {}
        self.db = actdb.open(self.subject.db)

    def all(self) -> list[Claim]:
        """Run every step; the figures are written as they come."""
        with self.db:
            found: list[Claim] = []
            for number, step in enumerate(
                (
                    self.characterise, self.ablate, self.relate_cosine, self.cluster, self.split,
                    self.scale, self.ablate_ranks, self.steer, self.remove, self.encode,
                ),
                1,
            ):  # fmt: skip
                note(f"{self.head.name}, step {number}: {str(step.__doc__).partition(':')[0].lower()}")
                found += step()
            return [self.reference.judge(entry) for entry in found]

    @property
    def run_name(self) -> str:
        """The run that the claims belong to."""
        return f"{self.subject.name}-words"

    def characterise(self) -> list[Claim]:
        """Characterise: score, ranking, pattern."""
        run = self._open(self.run_name)
        layer, head = self.head.layer, self.head.head
        own = next(entry for entry in self.ranked if (entry.layer, entry.head) == (layer, head))
        tokens = run.tokens(0).tolist()
        pattern = run["pattern"].sel(layer=layer, head=head, prompt=0).numpy()
        title = f"{self.head.name} of {self.subject.name} on random words"
        self._keep(
            "pattern", picture.draw_pattern(self._path("pattern"), pattern, tokens, self.categories, title=title)
        )
        title = f"Heads of {self.subject.name} by semantic score"
        self._keep("ranking", picture.draw_ranking(self._path("ranking"), self.ranked, title=title))
        return [
            *claiming.score_claims(own, self._null, n_heads=self.n_chosen_from, seed=self.seed),
            *claiming.ranking_claims(self.ranked, seed=self.seed),
        ]

    def ablate(self) -> list[Claim]:
        """Component ablation: the score with one component of the head's input at its mean."""
        plain = self._scores(self._parts)
        scores = {"none": plain["score"]}
        scores |= {name: self._scores(run)["score"] for name, run in self.head.harvest_ablations(self._parts)}
        title = f"What {self.head.name}'s score rests on"
        null = float(np.median(plain["shuffled"]))
        self._keep("ablation", picture.draw_ablation(self._path("ablation"), scores, null, title=title))
        return list(claiming.ablation_claims(scores, null, seed=self.seed))

    def relate_cosine(self) -> list[Claim]:
        """Cosine against attention: on the vocabulary, against random weights."""
        circuits = [self._circuit, *self._controls[:N_DRAWN_CONTROLS]]
        curve, *controls = attention_by_cosine(self._inputs, circuits)
        title = f"{self.head.name}: attention by similarity, {len(self._inputs)} tokens"
        self._keep("cosine", picture.draw_cosine(self._path("cosine"), curve, controls, title=title))
        return list(claiming.cosine_claims(curve, controls, seed=self.seed))

    def cluster(self) -> list[Claim]:
        """Token communities: Leiden on each token's strongest keys."""
        n = min(self.extent.n_graph, len(self._vocabulary))
        labels, inputs = self.subject.labels[self._vocabulary[:n]], self._inputs[:n]
        scores = self._token_scores.base[:n, :n]
        found = cluster(scores, labels, seed=self.seed)
        others = [token_scores(inputs, each).base for each in self._controls[:N_CLUSTERED_CONTROLS]]
        controls = [cluster(each, labels, seed=self.seed) for each in others]
        rewired = find_communities(scores, seed=self.seed, rewired=True)
        title, path = f"{self.head.name}: communities of the {n} commonest tokens", self._path("communities")
        caption = picture.draw_communities(
            path, found.communities, self._vocabulary, self.categories, title=title, seed=self.seed
        )
        self._keep("communities", caption)
        return list(claiming.community_claims(found, controls, rewired, seed=self.seed))

    def split(self) -> list[Claim]:
        """Symmetric and skew parts: eigenvalues, norms, heat maps beside random controls."""
        circuit, controls = self._circuit, self._controls
        drawn, rows, names, sizes = self._grouped_words()
        control = controls[0]
        parts = {"E S Eᵀ": circuit.symmetric, "E A Eᵀ": circuit.skew}
        parts |= {"random symmetric": control.symmetric, "random skew": control.skew}
        maps = {name: drawn @ part @ drawn.T / circuit.scale for name, part in parts.items()}
        title = f"{self.head.name}: words grouped by category"
        self._keep("parts", picture.draw_parts(self._path("parts"), maps, names, sizes, title=title))
        shown = controls[:N_DRAWN_CONTROLS]
        title = f"{self.head.name}: eigenvalues"
        self._keep("spectrum", picture.draw_spectrum(self._path("spectrum"), circuit, shown, title=title))
        own, others = self._suppressions
        return [
            *claiming.spectrum_claims(circuit, controls, seed=self.seed),
            *claiming.suppression_claims(own, others, n=len(rows), seed=self.seed),
        ]

    def scale(self) -> list[Claim]:
        """Eigenvalue scaling: the negative eigenvalues of S times a factor."""
        found, control = self._scaled
        suppressed, n = claiming.is_suppressed(*self._suppressions), len(self._ranked_scores[0].base)
        return list(claiming.scaling_claims(found, control, n=n, suppressed=suppressed, seed=self.seed))

    def ablate_ranks(self) -> list[Claim]:
        """Rank ablation: the most negative eigenvalues of S times a factor, one by one."""
        scores, control = self._ranked_scores
        found = scale_first(scores)
        others = scale_first(control, factors=(0.0, 1.0))
        n = len(scores.base)
        title = f"{self.head.name}: eigenvalues of S scaled"
        self._keep("scaling", picture.draw_scaling(self._path("scaling"), *self._scaled, found, n=n, title=title))
        return list(claiming.rank_ablation_claims(found, others, n=n, seed=self.seed))

    def steer(self) -> list[Claim]:
        """Gradient steering: a step on tr(W_Q W_Kᵀ) up and down, in the live model."""
        runs = dict(self.head.harvest_steering(self._plain))
        changes = self._changes(runs)
        shown = {"suppressed": runs[-RATES[-1]], "as it is": self._plain, "boosted": runs[RATES[-1]]}
        patterns = {
            f"{name} ({rate:+g})" if rate else name: self._pattern(run)
            for (name, run), rate in zip(shown.items(), (-RATES[-1], 0, RATES[-1]), strict=True)
        }
        title = f"Steering {self.head.name}'s self-attention"
        self._keep("steering", picture.draw_steering(self._path("steering"), patterns, changes, title=title))
        return list(claiming.steering_claims(changes, seed=self.seed))

    def remove(self) -> list[Claim]:
        """Head ablation: the head's output at its mean, on text and successions."""
        changes = self._changes(dict(self.head.harvest_without_head(self._plain)))
        title = f"Without {self.head.name}"
        self._keep("removal", picture.draw_removal(self._path("removal"), changes, self.head.head, title=title))
        return list(claiming.removal_claims(changes, self.head.head, seed=self.seed))

    def encode(self) -> list[Claim]:
        """Sparse autoencoder: trained from the database's shuffled rows, its features against attention."""
        trained, explained = self._train()
        rows = np.flatnonzero(self.subject.labels[self._vocabulary] >= 0)
        labels = self.subject.labels[self._vocabulary[rows]]
        scores = self._token_scores.base[np.ix_(rows, rows)]
        alone = self._alone[RESIDUAL].sel(layer=self.head.layer, prompt=rows.tolist()).numpy()
        latents = encode_tokens(trained.model, alone)
        found = compare_features(latents, scores, labels, n_permutations=self.extent.n_permutations, seed=self.seed)
        pairs = np.triu_indices(len(rows), 1)
        similar, both_ways = similarity(latents)[pairs], ((scores + scores.T) / 2)[pairs]
        same = (labels[:, None] == labels[None])[pairs]
        path = self._path("autoencoder")
        self._keep("autoencoder", picture.draw_autoencoder(path, trained, similar, both_ways, same))
        return list(claiming.autoencoder_claims(trained, explained, found, seed=self.seed))

    def _train(self) -> tuple[Trained, float]:
        """Train the autoencoder on the corpus but for some texts; returns it with what it explains of those."""
        layer = self.head.layer
        stored = self._corpus["resid_post"].sel(layer=layer - 1) if layer else self._corpus[RESIDUAL].sel(layer=0)
        prompts = self._corpus.prompt_ids()
        training = stored.sel(prompt=[prompt for prompt in prompts if prompt % HELD_OUT])
        held_out = stored.sel(prompt=[prompt for prompt in prompts if prompt % HELD_OUT == 0])
        width = training.shape[-1]
        trained = train_autoencoder(
            training,
            n_latents=min(LATENTS_A_DIMENSION * width, MOST_LATENTS),
            k=int(np.clip(width // ACTIVE_SHARE, LEAST_ACTIVE, MOST_ACTIVE)),
            epochs=max(1, self.extent.autoencoder_rows // training.n_rows),
            seed=self.seed,
        )
        return trained, explained_variance(trained.model, held_out.numpy())

    @property
    def categories(self) -> Categories:
        """The subject's categories."""
        return self.subject.categories

    @cached_property
    def _null(self) -> PermutationNull:
        run, head = self._open(self.run_name), self.head
        n = self.extent.n_permutations
        return permute_categories(run, self.subject.labels, layer=head.layer, head=head.head, n=n, seed=self.seed)

    @cached_property
    def _scaled(self) -> tuple[dict[float, SelfAttention], dict[float, SelfAttention]]:
        """Self-attention with the negative eigenvalues scaled, of the head and of a random circuit."""
        scores, control = self._ranked_scores
        return scale_negative(scores), scale_negative(control)

    @cached_property
    def _suppressions(self) -> tuple[Suppression, list[Suppression]]:
        """How far the words' own scores in E S Eᵀ lie from those of others, of the head and of random circuits."""
        rows = np.flatnonzero(self.subject.labels[self._vocabulary] >= 0)
        words, labels = self._inputs[rows].astype(np.float64), self.subject.labels[self._vocabulary[rows]]
        found = [self_suppression(words @ e.symmetric @ words.T, labels) for e in (self._circuit, *self._controls)]
        return found[0], found[1:]

    @cached_property
    def _parts(self) -> actdb.Run:
        return self.head.harvest_parts()

    @cached_property
    def _corpus(self) -> actdb.Run:
        return self.subject.harvest_corpus(self.head.layer)

    @cached_property
    def _plain(self) -> actdb.Run:
        return self.head.harvest_behaviour()

    @cached_property
    def _vocabulary(self) -> npt.NDArray[np.int64]:
        corpus = self._corpus
        self.db.refresh()
        return choose_vocabulary(self.db, corpus, self.subject)

    @cached_property
    def _alone(self) -> actdb.Run:
        return self.head.harvest_vocabulary(self._parts, self._vocabulary)

    @cached_property
    def _inputs(self) -> Floats:
        """E [token, d_model]: the head's input for each token alone."""
        return np.asarray(self._alone[self.head.input_site].sel(layer=self.head.layer).numpy())

    @cached_property
    def _circuit(self) -> Circuit:
        return read_circuit(self._alone, layer=self.head.layer, head=self.head.head)

    @cached_property
    def _controls(self) -> list[Circuit]:
        return [random_circuit(self._circuit, seed=self.seed + i) for i in range(self.extent.n_controls)]

    @cached_property
    def _token_scores(self) -> TokenScores:
        return token_scores(self._inputs, self._circuit)

    @cached_property
    def _ranked_scores(self) -> tuple[TokenScores, TokenScores]:
        """Scores between the commonest tokens, by the head and by a random circuit."""
        inputs = self._inputs[: self.extent.n_ranked]
        return token_scores(inputs, self._circuit), token_scores(inputs, self._controls[0])

    def _grouped_words(self) -> tuple[Floats, npt.NDArray[np.int64], list[str], list[int]]:
        """Inputs of some words of each category, side by side; rows of all words; names and sizes of the groups."""
        place = {int(token): row for row, token in enumerate(self._vocabulary)}
        groups = [[place[token] for token in tokens if token in place] for tokens in self.categories.tokens.values()]
        shown = [group[: picture.N_WORDS_A_CATEGORY] for group in groups]
        rows = np.array([row for group in groups for row in group], np.int64)
        drawn = self._inputs[[row for group in shown for row in group]].astype(np.float64)
        return drawn, rows, list(self.categories.names), [len(group) for group in shown]

    def _scores(self, run: actdb.Run) -> dict[str, Floats]:
        """Scores of the head on each prompt of a run, and the same with categories shuffled."""
        table = score_heads(run, self.subject.labels, seed=self.seed).to_pylist()
        own = [row for row in table if (row["layer"], row["head"]) == (self.head.layer, self.head.head)]
        return {column: np.array([row[column] for row in own]) for column in ("score", "shuffled")}

    def _changes(self, runs: Mapping[Name, actdb.Run]) -> dict[Name, Change]:
        """What interventions change, from the model as it is."""
        self.db.refresh()
        read = partial(read_behaviour, self.db, layer=self.head.layer, head=self.head.head)
        before = read(self._plain.name)
        return {name: read(run.name).change(before) for name, run in runs.items()}

    def _pattern(self, run: actdb.Run) -> Floats:
        return np.asarray(run["pattern"].sel(layer=self.head.layer, head=self.head.head, prompt=0).numpy())

    def _open(self, name: str) -> actdb.Run:
        self.db.refresh()
        return self.db.run(name)

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.png"

    def _keep(self, name: str, caption: str) -> None:
        self.figures[f"figures/{name}.png"] = caption
