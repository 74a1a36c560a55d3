"""What a language model is harvested on: packed documents to train on, and pairs of prompts to patch between."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

import actdb

CONTEXT = 1024
NAMES = (
    *("Mary", "John", "Tom", "James", "Sarah", "David", "Anna", "Paul", "Lisa", "Mark", "Kate", "Peter"),
    *("Emma", "Jack", "Alice", "Simon", "Laura", "Kevin", "Rachel", "Adam"),
)
TEMPLATES = (
    "When {first} and {second} went to the store, {subject} gave a drink to",
    "After {first} and {second} had lunch, {subject} gave a book to",
    "While {first} and {second} were at the office, {subject} handed the keys to",
    "Then {first} and {second} had a long walk, and {subject} passed the map to",
)
LEAST_NAMES = 4


def pack_documents(
    documents: Iterable[Sequence[int]], *, end: int, context: int = CONTEXT
) -> Iterator[dict[str, list[int]]]:
    """Join documents of token ids, an `end` token after each, and cut the whole into prompts of `context` tokens.

    What is left over at the end is dropped: every prompt is full, as in the method's own buffer.
    """
    held: list[int] = []
    for document in documents:
        held += [*document, end]
        while len(held) >= context:
            yield {"tokens": held[:context]}
            del held[:context]


def indirect_object_prompts(
    encode: Callable[[str], Sequence[int]], n_pairs: int, *, start: Sequence[int] = (), seed: int
) -> list[dict[str, Any]]:
    """Return clean prompts of indirect object identification, each followed by its corrupted partner, as token ids.

    Clean: "When Mary and John went to the store, John gave a drink to" → Mary. Corrupted: the first two names
    change places. What follows each of them (IO+1 and S+1) then has another token before it, and nothing else.
    Labels are those of `evaluation.find_pairs`. Names that are not one token are left out. Raises `SettingError`
    for a tokenizer that has fewer than four of them.
    """
    names = {name: encode(f" {name}") for name in NAMES}
    usable = [name for name, ids in names.items() if len(ids) == 1]
    if len(usable) < LEAST_NAMES:
        raise actdb.SettingError(f"the tokenizer has {len(usable)} of the names as one token; {LEAST_NAMES} are needed")
    generator = np.random.default_rng((seed, 51))
    found: list[dict[str, Any]] = []
    for pair in range(n_pairs):
        template = TEMPLATES[int(generator.integers(len(TEMPLATES)))]
        other, subject = (usable[i] for i in generator.choice(len(usable), 2, replace=False))
        order = [other, subject] if generator.random() < 0.5 else [subject, other]
        clean, corrupted = (
            [*start, *encode(template.format(first=first, second=second, subject=subject))]
            for first, second in (order, order[::-1])
        )
        places = [clean.index(names[name][0]) + 1 for name in order]
        labels = {"patch_pos": " ".join(map(str, places)), "answer": names[other][0], "wrong": names[subject][0]}
        found.append({"tokens": clean, "pair": pair, "role": "clean", **labels})
        found.append({"tokens": corrupted, "pair": pair, "role": "corrupted", **dict.fromkeys(labels)})
    return found
