"""The head under study and the runs that its questions are read from: each harvest stands once, under its name."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import actdb
from analyses.common.intervention import Hook, mean_ablation
from analyses.semantic_head.category import Categories
from analyses.semantic_head.intervention import (
    ablate_component,
    component_hooks,
    component_means,
    hook_names,
    isolate_token,
    steer,
)
from analyses.semantic_head.prompt import succession_prompts, text_prompts, word_prompts

Ints = npt.NDArray[np.int64]
NORMALISED, RESIDUAL = "ln1.hook_normalized", "resid_pre"
"""The head's input, and where the model has no norm before its attention."""
RATES = (0.1, 0.3, 1.0)
N_OTHER_HEADS = 3


@dataclass(frozen=True)
class Extent:
    """How much of everything: prompts, tokens of the vocabulary, permutations, controls."""

    n_prompts: int = 24
    n_words: int = 255
    n_parts: int = 128
    part_length: int = 64
    n_texts: int = 32
    n_corpus: int = 320
    text_length: int = 64
    n_vocabulary: int = 8192
    n_graph: int = 3000
    n_ranked: int = 2048
    n_permutations: int = 199
    n_controls: int = 20
    autoencoder_rows: int = 160_000


FULL = Extent()
SMALL = Extent(
    n_prompts=8,
    n_words=127,
    n_parts=32,
    n_texts=16,
    n_corpus=64,
    n_vocabulary=1024,
    n_graph=800,
    n_ranked=512,
    n_permutations=99,
    n_controls=8,
    autoencoder_rows=60_000,
)


@dataclass(frozen=True)
class Subject:
    """A model, its categories, and where what it does is kept; `name` begins the names of its runs."""

    name: str
    model: Any
    categories: Categories
    db: Path
    extent: Extent
    seed: int
    text: Path | None = None

    @property
    def d_vocab(self) -> int:
        """Tokens of the vocabulary."""
        return int(self.model.cfg.d_vocab)

    @cached_property
    def labels(self) -> Ints:
        """The category of each token id, −1 for none."""
        return self.categories.labels(self.d_vocab)

    def length(self, wanted: int) -> int:
        """Return how many tokens of a prompt fit the context."""
        return min(wanted, int(self.model.cfg.n_ctx))

    def harvest(
        self, kind: str, prompts: Sequence[Mapping[str, Any]], *, hooks: Sequence[Hook] = (), **options: Any
    ) -> actdb.Run:
        """Harvest prompts, unless that is done, as run `<name>-<kind>`, with folded weights and in float32."""
        given = {"processing": "folded", "store": "float32", "stats": (), **options}
        if hooks:
            given |= {"hooks": list(hooks), "hooks_id": f"semantic_head:{kind}"}
        return actdb.harvest(self.model, prompts, out=self.db, run=f"{self.name}-{kind}", **given)

    def harvest_words(self) -> actdb.Run:
        """Harvest the patterns of all heads on random words."""
        n_words = self.length(self.extent.n_words + 1) - 1
        prompts = word_prompts(self.categories, self.extent.n_prompts, n_words=n_words, seed=self.seed)
        return self.harvest("words", prompts, sites=("pattern",))

    def harvest_corpus(self, layer: int) -> actdb.Run:
        """Harvest the residual stream before a layer on text: what frequencies and the autoencoder are made from."""
        below: dict[str, Any] = (
            {"sites": ("resid_post",), "layers": [layer - 1]} if layer else {"sites": (RESIDUAL,), "layers": [0]}
        )
        prompts = self.texts(self.extent.n_corpus)
        return self.harvest(f"L{layer}-corpus", prompts, store="float16", max_length=self._limit, **below)

    def texts(self, n: int) -> list[dict[str, Any]]:
        """Return text prompts: the user's, or our own."""
        length = self.length(self.extent.text_length)
        return text_prompts(self.text, self.categories, n=n, length=length, d_vocab=self.d_vocab, seed=self.seed)

    @property
    def _limit(self) -> int:
        return self.length(self.extent.text_length)


@dataclass(frozen=True)
class Head:
    """One head of a subject, with the harvests that its steps need."""

    subject: Subject
    layer: int
    head: int

    @property
    def name(self) -> str:
        """The head as L1H5."""
        return f"L{self.layer}H{self.head}"

    @property
    def input_site(self) -> str:
        """The site of the head's normalised input."""
        found = f"blocks.{self.layer}.{NORMALISED}" in hook_names(self.subject.model)
        return NORMALISED if found else RESIDUAL

    @cached_property
    def components(self) -> dict[str, str]:
        """Hooks of what sums up to the layer's input, by component."""
        return component_hooks(self.subject.model, self.layer)

    def harvest_parts(self) -> actdb.Run:
        """Harvest what sums up to the layer's input, and the head's pattern, on random words."""
        kinds = {f"{name.split()[0]}_out" for name in self.components if " " in name}
        sites = ("embed", *sorted(kinds), "pattern")
        return self._parts("parts", sites=sites, layers=list(range(self.layer + 1)))

    def harvest_ablations(self, parts: actdb.Run) -> Iterator[tuple[str, actdb.Run]]:
        """Harvest the head's pattern with one component of its input replaced by its mean, by component."""
        for name, mean in component_means(parts, list(self.components)).items():
            hooks = ablate_component(self.subject.model, name, mean, layer=self.layer)
            kind = f"parts-without-{name.replace(' ', '')}"
            yield name, self._parts(kind, sites=("pattern",), layers=[self.layer], hooks=hooks)

    def _parts(self, kind: str, **options: Any) -> actdb.Run:
        extent, subject = self.subject.extent, self.subject
        n_words = subject.length(extent.part_length) - 1
        prompts = word_prompts(subject.categories, extent.n_parts, n_words=n_words, seed=subject.seed + 1)
        return subject.harvest(self._kind(kind), prompts, **options)

    def harvest_vocabulary(self, parts: actdb.Run, tokens: Ints) -> actdb.Run:
        """Harvest the head's input for each token on its own, positions and attention held at their means.

        The `row`-th prompt is the `row`-th of `tokens`; its token id is a label as well.
        """
        hooks = isolate_token(component_means(parts, list(self.components)), self.components)
        prompts = [{"tokens": [token], "word": token} for token in tokens.tolist()]
        sites = tuple(dict.fromkeys((self.input_site, RESIDUAL)))
        return self.subject.harvest(self._kind("vocabulary"), prompts, sites=sites, layers=[self.layer], hooks=hooks)

    def harvest_behaviour(self, kind: str = "", hooks: Sequence[Hook] = ()) -> actdb.Run:
        """Harvest what the head and the model do on words, text and successions, under an intervention."""
        subject, extent = self.subject, self.subject.extent
        n_words = subject.length(extent.part_length) - 1
        prompts = [
            *word_prompts(subject.categories, max(extent.n_prompts // 2, 4), n_words=n_words, seed=subject.seed + 2),
            *succession_prompts(subject.categories),
            *subject.texts(extent.n_texts),
        ]
        options = {"sites": ("pattern", "z"), "layers": [self.layer], "stats": ("heads", "tokens")}
        name = self._kind(f"behaviour{kind and '-'}{kind}")
        return subject.harvest(name, prompts, hooks=hooks, max_length=subject._limit, **options)

    def harvest_steering(self, plain: actdb.Run) -> Iterator[tuple[float, actdb.Run]]:
        """Harvest behaviour after a gradient step on tr(W_Q W_Kᵀ), by its rate: negative ones suppress."""
        for rate in (*(-rate for rate in reversed(RATES)), *RATES):
            hooks = steer(plain, layer=self.layer, head=self.head, rate=rate, site=self.input_site)
            word = "boost" if rate > 0 else "suppress"
            yield rate, self.harvest_behaviour(f"{word}-{abs(rate)}", hooks)

    def harvest_without_head(self, plain: actdb.Run) -> Iterator[tuple[int, actdb.Run]]:
        """Harvest behaviour with one head's z at its mean: this head first, then others of its layer, the null."""
        others = [head for head in range(int(self.subject.model.cfg.n_heads)) if head != self.head]
        for head in (self.head, *others[:N_OTHER_HEADS]):
            hook = mean_ablation(plain, "z", layer=self.layer, head=head)
            yield head, self.harvest_behaviour(f"without-{head}", [hook])

    def _kind(self, kind: str) -> str:
        return f"{self.name}-{kind}"


def choose_vocabulary(db: actdb.Database, corpus: actdb.Run, subject: Subject) -> Ints:
    """Return token ids by their frequency in the corpus, then by id, as many as asked for: categorised ones are in it.

    Byte-pair vocabularies are numbered by merges, so that ids without a count go on by rough frequency too.
    """
    counted = db.sql(
        "SELECT token_id FROM tokens WHERE run = $1 GROUP BY token_id ORDER BY count(*) DESC, token_id", [corpus.name]
    ).fetchall()
    ordered = list(dict.fromkeys([*(int(token) for (token,) in counted), *range(subject.d_vocab)]))
    words = set(subject.categories.words)
    n = min(subject.extent.n_vocabulary, subject.d_vocab)
    others = [token for token in ordered if token not in words][: max(n - len(words), 0)]
    kept = words | set(others)
    return np.array([token for token in ordered if token in kept], np.int64)
