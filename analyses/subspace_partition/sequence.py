"""Sequences to copy: a pattern, and once more the same; no token, or no pair of tokens, comes twice in a pattern.

A sequence is a start token and then the pattern twice. A generator alone decides what is drawn, so that the data of a
training step follow from its number.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

import actdb

Ints = npt.NDArray[np.int64]
KINDS = ("token", "bigram")
BOS = 0
"""The start token; data tokens count from 1."""


@dataclass(frozen=True)
class Task:
    """What is copied: patterns of `lengths` (shortest, longest) from `n_tokens` data tokens, of one of `KINDS`.

    token: no token comes twice in a pattern, so that the token before tells the next one. bigram: tokens do come twice,
    ordered pairs do not, so that it takes the two tokens before; a pattern then draws on `n_distinct` tokens alone,
    which makes repeated ones frequent. Raises `SettingError` for patterns that cannot be drawn.
    """

    n_tokens: int
    lengths: tuple[int, int]
    kind: str = "token"
    n_distinct: int = 8

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise actdb.SettingError(f"task {self.kind!r}: choose one of {', '.join(KINDS)}")
        shortest, longest = self.lengths
        # Of pairs at least half are left over, so that most walks over them find an end.
        most = self.n_tokens if self.kind == "token" else min(self.n_distinct, self.n_tokens) ** 2 // 2
        if not self.first_known < shortest <= longest <= most:
            raise actdb.SettingError(
                f"patterns of {shortest} to {longest} tokens: give lengths of {self.first_known + 1} to {most}, so that"
                f" no {self.kind} has to come twice"
            )

    @property
    def n_context(self) -> int:
        """Tokens of the longest sequence, start token included."""
        return 1 + 2 * self.lengths[1]

    @property
    def first_known(self) -> int:
        """The place in a pattern from which on a repeated token follows from those before it."""
        return 2 if self.kind == "bigram" else 1

    def known(self, length: int) -> tuple[int, int]:
        """Return the range of positions whose *next* token follows from those before it: the repeat but its start."""
        return length + self.first_known, 2 * length


def draw_patterns(task: Task, generator: np.random.Generator, n: int, length: int) -> Ints:
    """Return `n` patterns [n, length] of data tokens 1 … n_tokens."""
    if task.kind == "token":
        return 1 + generator.random((n, task.n_tokens)).argsort(axis=1)[:, :length]
    n_distinct = min(task.n_distinct, task.n_tokens)
    tokens = 1 + generator.random((n, task.n_tokens)).argsort(axis=1)[:, :n_distinct]
    return np.take_along_axis(tokens, _draw_walks(generator, n, n_distinct, length), axis=1)


def repeat(patterns: Ints) -> Ints:
    """Return sequences [n, 1 + 2·length] of patterns [n, length]: the start token, the pattern, the pattern."""
    start = np.full((len(patterns), 1), BOS, np.int64)
    return np.concatenate([start, patterns, patterns], axis=1)


def copy_prompts(task: Task, n: int, *, seed: int, twice: bool = True) -> list[dict[str, Any]]:
    """Return `n` prompts of lengths spread evenly, with the labels `pattern_length`, `known_from` and `known_to`.

    The latter are the range of `Task.known`. Without `twice` the pattern stands but once: then no row has a twin in
    its own prompt, beside which any other neighbour would be far.
    """
    generator = np.random.default_rng((seed, 31, int(twice)))
    lengths = np.resize(np.arange(task.lengths[0], task.lengths[1] + 1), n)
    found: list[dict[str, Any]] = []
    for length in lengths.tolist():
        tokens = repeat(draw_patterns(task, generator, 1, length))[0].tolist()
        found.append({"tokens": tokens if twice else tokens[: 1 + length], **_labels(task, length)})
    return found


def paired_prompts(task: Task, n: int, *, length: int, seed: int) -> list[dict[str, Any]]:
    """Return `n` clean prompts of one length, and after them their corrupted partners, with labels `pair` and `role`.

    The partner has every data token renamed by a cycle: each token, the one before it and each answer differ.
    """
    generator = np.random.default_rng((seed, 32))
    clean = draw_patterns(task, generator, n, length)
    renamed = np.stack([_rename(generator, pattern, task.n_tokens) for pattern in clean])
    return [
        {"tokens": tokens, "pair": pair, "role": role, **_labels(task, length)}
        for role, patterns in (("clean", clean), ("corrupted", renamed))
        for pair, tokens in enumerate(repeat(patterns).tolist())
    ]


def _labels(task: Task, length: int) -> dict[str, int]:
    begin, end = task.known(length)
    return {"pattern_length": length, "known_from": begin, "known_to": end}


def _rename(generator: np.random.Generator, pattern: Ints, n_tokens: int) -> Ints:
    """Give every data token the name of the next one in a random cycle: none keeps its own."""
    cycle = generator.permutation(n_tokens)
    following = np.empty(n_tokens, np.int64)
    following[cycle] = np.roll(cycle, -1)
    return 1 + following[pattern - 1]


def _draw_walks(generator: np.random.Generator, n: int, n_nodes: int, length: int) -> Ints:
    """Draw walks [n, length] over nodes that use no ordered pair twice; those that came to a dead end begin anew."""
    walks, found = _try_walks(generator, n, n_nodes, length)
    while not found.all():
        walks[~found], again = _try_walks(generator, int((~found).sum()), n_nodes, length)
        found[~found] = again
    return walks


def _try_walks(generator: np.random.Generator, n: int, n_nodes: int, length: int) -> tuple[Ints, npt.NDArray[np.bool_]]:
    """Walk at random over unused pairs, a node with itself among them; whether each walk found its end.

    The pair where a pattern meets its repeat must be unused too: it would have two successors.
    """
    free = np.ones((n, n_nodes, n_nodes), bool)
    rows, found = np.arange(n), np.ones(n, bool)
    walks = np.empty((n, length), np.int64)
    walks[:, 0] = generator.integers(n_nodes, size=n)
    for i in range(1, length):
        before = walks[:, i - 1]
        choices = free[rows, before]  # [walk, node]
        found &= choices.any(1)
        walks[:, i] = np.where(choices, generator.random(choices.shape), -1.0).argmax(1)
        free[rows, before, walks[:, i]] = False
    return walks, found & free[rows, walks[:, -1], walks[:, 0]]
