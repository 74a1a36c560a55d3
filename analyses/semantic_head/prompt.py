"""What the model reads: lists of random words, text with topics, runs of words in a known order."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import actdb
from analyses.semantic_head.category import Categories
from analyses.semantic_head.word import CATEGORIES, SENTENCES

N_TOPICS, N_TOPIC_WORDS, N_FILLERS = 2, 4, 4
LEAST_RUN, LONGEST_RUN = 4, 6


def word_prompts(categories: Categories, n: int, *, n_words: int, seed: int) -> list[dict[str, Any]]:
    """Return prompts of BOS and random words, each from a random category; where there is no BOS, words alone."""
    generator = np.random.default_rng((seed, 0))
    groups = list(categories.tokens.values())
    begin = [] if categories.bos is None else [categories.bos]
    prompts = []
    for _ in range(n):
        chosen = generator.integers(0, len(groups), n_words)
        words = [groups[group][generator.integers(0, len(groups[group]))] for group in chosen.tolist()]
        prompts.append({"tokens": [*begin, *words], "kind": "words"})
    return prompts


def succession_prompts(categories: Categories, *, limit: int = 48) -> list[dict[str, Any]]:
    """Return prompts of BOS and words in their known order: the last is what the model is to predict."""
    begin = [] if categories.bos is None else [categories.bos]
    runs = [
        list(run[start : start + length])
        for run in categories.successions
        for length in range(LEAST_RUN, LONGEST_RUN + 1)
        for start in range(len(run) - length + 1)
    ]
    step = max(1, len(runs) // limit)
    return [{"tokens": [*begin, *run], "kind": "succession"} for run in runs[::step][:limit]]


def text_prompts(
    path: Path | None, categories: Categories, *, n: int, length: int, d_vocab: int, seed: int
) -> list[dict[str, Any]]:
    """Return text: of a file of the user's, else sentences, else tokens with topics where there is no tokenizer."""
    if path is not None:
        return read_text(path, n, seed=seed)
    if categories.texts:
        return list(sentences(n, seed=seed))
    return list(topic_text(categories, n, length=length, d_vocab=d_vocab, seed=seed))


def read_text(path: Path, n: int, *, seed: int) -> list[dict[str, Any]]:
    """Return up to `n` prompts of a .jsonl or .txt file, drawn over all of it; raises `PromptError` for any other."""
    if path.suffix not in (".jsonl", ".txt"):
        raise actdb.PromptError(f"{path}: give --prompts as .jsonl (text or tokens a line) or .txt")
    try:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        held = [json.loads(line) if path.suffix == ".jsonl" else {"text": line} for line in lines]
    except (OSError, ValueError) as exc:
        raise actdb.PromptError(f"{path} cannot be read: {exc}") from exc
    order = np.random.default_rng((seed, 2)).permutation(len(held))[:n]
    drawn = [held[i] for i in sorted(order.tolist())]
    kept = [{name: prompt[name] for name in ("text", "tokens") if name in prompt} for prompt in drawn]
    if not all(kept) or not kept:
        raise actdb.PromptError(f"{path}: each line needs text or tokens")
    return [{**prompt, "kind": "text"} for prompt in kept]


def sentences(n: int, *, seed: int) -> Iterator[dict[str, Any]]:
    """Yield short texts: sentences with gaps that words of their category fill, some of them again and again."""
    generator = np.random.default_rng((seed, 3))
    for _ in range(n):
        words = {name: generator.choice(held, 4).tolist() for name, held in CATEGORIES.items()}
        chosen = [SENTENCES[i] for i in generator.choice(len(SENTENCES), 4, replace=False).tolist()]
        filled = [text.format(**{name: _Draw(held, generator) for name, held in words.items()}) for text in chosen]
        yield {"text": " ".join(filled), "kind": "text"}


class _Draw:
    """A gap in a sentence: another of a category's chosen words each time that it is filled."""

    def __init__(self, words: list[str], generator: np.random.Generator) -> None:
        self.words, self.generator = words, generator

    def __format__(self, spec: str) -> str:
        return str(self.generator.choice(self.words))


def topic_text(categories: Categories, n: int, *, length: int, d_vocab: int, seed: int) -> Iterator[dict[str, Any]]:
    """Yield prompts of a language in which a semantic head helps: a few words of two categories come back at random.

    A token is followed by another of the prompt's words of its category (0.6), by its successor in the category (0.1),
    or by any of the prompt's words and some tokens of no category (0.3).
    """
    generator = np.random.default_rng((seed, 1))
    groups = [np.array(tokens) for tokens in categories.tokens.values()]
    others = np.setdiff1d(
        np.arange(d_vocab), [*categories.words, *([] if categories.bos is None else [categories.bos])]
    )
    for _ in range(n):
        chosen = generator.choice(len(groups), N_TOPICS, replace=False)
        topics = [(groups[i], generator.choice(groups[i], N_TOPIC_WORDS, replace=False)) for i in chosen]
        fillers = generator.choice(others, min(N_FILLERS, len(others)), replace=False)
        tokens = [categories.bos if categories.bos is not None else int(topics[0][1][0])]
        while len(tokens) < length:
            tokens.append(_follow(tokens[-1], topics, fillers, generator))
        yield {"tokens": tokens, "kind": "text"}


def _follow(
    token: int,
    topics: list[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]],
    fillers: npt.NDArray[np.int64],
    generator: np.random.Generator,
) -> int:
    own = next((topic for topic in topics if token in topic[1]), None)
    draw = generator.random()
    if own is not None and draw < 0.6:
        return int(generator.choice(own[1][own[1] != token]))
    if own is not None and draw < 0.7:
        return int(np.roll(own[0], -1)[own[0] == token][0])
    return int(generator.choice(np.concatenate([*(topic[1] for topic in topics), fillers])))
