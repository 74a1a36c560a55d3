"""Which tokens belong together: word lists filtered to single tokens, or groups of a model without tokenizer."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

import actdb
from analyses.semantic_head.word import CATEGORIES, SUCCESSIONS, SYMBOLS

N_CATEGORIES = 8
LEAST_WORDS = 4
N_GROUP_TOKENS = 24
SPACES = "Ġ▁"
"""How byte-level BPE and SentencePiece write the space before a word."""
TABLE = "semantic_categories"


@dataclass(frozen=True)
class Categories:
    """Token ids by category; `kind` says where they come from: words, symbols, planted or arbitrary.

    `bos` is the token that prompts begin with, None where the model has none. `texts` are the tokens' texts where there
    are any. `successions` are runs of token ids in a known order.
    """

    kind: str
    tokens: Mapping[str, tuple[int, ...]]
    bos: int | None = None
    texts: Mapping[int, str] = field(default_factory=dict)
    successions: tuple[tuple[int, ...], ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the categories, in order."""
        return tuple(self.tokens)

    @cached_property
    def words(self) -> tuple[int, ...]:
        """All categorised tokens, category by category."""
        return tuple(token for tokens in self.tokens.values() for token in tokens)

    def text(self, token: int) -> str:
        """Return a token's text, or its number."""
        return self.texts.get(token, f"t{token}").strip() or "␣"

    def labels(self, n_tokens: int) -> npt.NDArray[np.int64]:
        """Return the category of each token id below `n_tokens`, −1 for none."""
        found = np.full(n_tokens, -1, np.int64)
        for index, tokens in enumerate(self.tokens.values()):
            found[list(tokens)] = index
        return found

    def table(self) -> pa.Table:
        """Return the table `semantic_categories` for SQL: token_id, token, category."""
        rows = [(token, self.text(token), name) for name, tokens in self.tokens.items() for token in tokens]
        ids, texts, names = zip(*rows, strict=True)
        return pa.table({"token_id": pa.array(ids, pa.int64()), "token": texts, "category": names})


def shuffle_labels(labels: npt.NDArray[np.int64], generator: np.random.Generator) -> npt.NDArray[np.int64]:
    """Permute which category each categorised token [token] belongs to: sizes stay, meanings go. The null of scores."""
    shuffled = labels.copy()
    known = np.flatnonzero(labels >= 0)
    shuffled[known] = labels[generator.permutation(known)]
    return shuffled


def find_categories(tokenizer: Any, *, d_vocab: int, seed: int) -> Categories:
    """Return the categories of a model: words, else symbols, that are single tokens; without tokenizer random groups.

    Raises `SettingError` where a tokenizer has too few of both.
    """
    if tokenizer is None:
        return arbitrary_categories(d_vocab, seed=seed)
    return categories_of(token_texts(tokenizer), bos=tokenizer.bos_token_id)


def categories_of(by_text: Mapping[str, int], *, bos: int | None, least: int = LEAST_WORDS) -> Categories:
    """Return the categories among tokens given by text; raises `SettingError` where one has fewer than `least`.

    All are cut to the size of the smallest: then every word is as frequent in random prompts, and permuting categories
    over words changes what they mean alone.
    """
    spaced = {name: [f" {word}" for word in words] for name, words in CATEGORIES.items()}
    counts = []
    for kind, family in (("words", spaced), ("symbols", SYMBOLS)):
        found = {name: tuple(by_text[text] for text in texts if text in by_text) for name, texts in family.items()}
        size = min(map(len, found.values()))
        if size >= least:
            kept = {name: tokens[:size] for name, tokens in found.items()}
            texts = {token: text for text, token in by_text.items()}
            return Categories(kind, kept, bos, texts, _successions(by_text, found if kind == "symbols" else {}))
        n_enough = sum(len(tokens) >= least for tokens in found.values())
        n_found = sum(map(len, found.values()))
        counts.append(f"{n_found} {kind}, {least} or more in {n_enough} of {len(found)} categories")
    raise actdb.SettingError(
        f"too few single tokens to make categories of: {'; '.join(counts)} (the lists stand in "
        "analyses/semantic_head/word.py)"
    )


def arbitrary_categories(d_vocab: int, *, seed: int, bos: int | None = None) -> Categories:
    """Draw groups of tokens for a model without tokenizer: they mean nothing, and nothing may be found in them."""
    n = min(N_GROUP_TOKENS, (d_vocab - 1) // N_CATEGORIES)
    if n < LEAST_WORDS:
        raise actdb.SettingError(f"a vocabulary of {d_vocab} is too small for {N_CATEGORIES} groups of {LEAST_WORDS}")
    drawn = np.random.default_rng(seed).permutation(np.setdiff1d(np.arange(d_vocab), [bos or 0]))
    groups = drawn[: N_CATEGORIES * n].reshape(N_CATEGORIES, n)
    tokens = {f"group {i}": tuple(group.tolist()) for i, group in enumerate(groups)}
    return Categories("arbitrary", tokens, bos, successions=tuple(tuple(group[:8].tolist()) for group in groups))


def token_texts(tokenizer: Any) -> dict[str, int]:
    """Return token ids by text, the space before a word as a space; special tokens left out."""
    special = set(tokenizer.all_special_ids)
    held = {entry: int(token) for entry, token in tokenizer.get_vocab().items() if token not in special}
    return {entry.translate(dict.fromkeys(map(ord, SPACES), " ")): token for entry, token in held.items()}


def _successions(
    by_text: Mapping[str, int], groups: Mapping[str, Sequence[int]], least: int = 5
) -> tuple[tuple[int, ...], ...]:
    """The longest run of each list that are single tokens; letters and digits for vocabularies without words."""
    found = []
    for words in SUCCESSIONS.values():
        run = [by_text.get(f" {word}") for word in words]
        ends = [i for i, token in enumerate(run) if token is None]
        longest = run[: ends[0]] if ends else run
        found.append(tuple(token for token in longest if token is not None))
    found += [tuple(tokens) for name, tokens in groups.items() if name in ("capitals", "letters", "digits")]
    return tuple(run for run in found if len(run) >= least)
