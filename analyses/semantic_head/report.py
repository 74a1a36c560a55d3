"""What the figures say, in words, for the report."""

import math
from collections.abc import Sequence

from analyses.common.report import Claim
from analyses.semantic_head.claims import RESTS, SEMANTIC
from analyses.semantic_head.subject import Head

KINDS = {
    "words": "words of eight semantic categories, single tokens of the model's tokenizer",
    "symbols": "parts of speech, letters and signs: the vocabulary is too small to hold words of semantic categories",
    "stored": "those that an earlier study kept in the database",
    "planted": "those that the model was built with",
    "arbitrary": "random groups of tokens, since the model has no tokenizer: nothing is to be found in them",
}


def sections(head: Head, entries: Sequence[Claim]) -> dict[str, str]:
    """Return sections of text by heading."""
    by_key = {entry.key: entry for entry in entries}
    return {
        f"Is {head.name} of {head.subject.name} a semantic head?": _semantic(head, by_key),
        "Does it attend to the near, and not to the same?": _near(by_key),
        "Where does the suppression come from?": _suppression(by_key),
        "What does the model use it for?": _use(by_key),
        "What to keep in mind": (
            "Scores between single tokens ignore biases and, with rotary positions, the rotation. Nulls: categories "
            "permuted over the words for the score, random W_Q and W_K of the same norm for whatever comes from "
            "weights, rewired edges for communities, other heads of the layer for ablations. Setting the negative "
            "eigenvalues to 0 makes any symmetric part attend to the same token, a random one too: what tells a "
            "suppressing head is where it starts."
        ),
    }


def _semantic(head: Head, by_key: dict[str, Claim]) -> str:
    score, advantage = by_key["score"], by_key["score.advantage"]
    verdict = "It is" if advantage.verdict == SEMANTIC else "It is not"
    carrying = [key.removeprefix("ablate.") for key, entry in by_key.items() if entry.verdict == RESTS]
    rests = f" The score rests on {_join(carrying)}." if carrying and verdict == "It is" else ""
    return (
        f"{verdict}: its score is {score.value:.2f} nats, {score.null:.2f} with categories permuted "
        f"({advantage.about.partition('; ')[2]}).{rests} The categories are {KINDS[head.subject.categories.kind]}."
    )


def _near(by_key: dict[str, Claim]) -> str:
    height, cosine, crossing = (by_key[f"cosine.{key}"] for key in ("height", "peak", "crossing"))
    if not height.value > 0:
        return f"No token gets more attention than the token itself: at best {height.value:.2f} nats less."
    begins = f", from {crossing.value:.2f} on more than the token itself" if math.isfinite(crossing.value) else ""
    return (
        f"Attention is highest at a cosine of {cosine.value:.2f}{begins}: {height.value:.2f} nats above the token "
        f"itself; random weights reach {height.null:.2f} ({height.verdict})."
    )


def _suppression(by_key: dict[str, Claim]) -> str:
    own, every, restored = by_key["suppression.same"], by_key["suppression.all"], by_key["scale.restored"]
    before, after = by_key["scale.1.mean_rank"], by_key["scale.0.mean_rank"]
    return (
        f"In E S Eᵀ a token's own score is {own.value:+.2f} deviations of its row from those of its category, "
        f"{every.value:+.2f} from all others ({own.verdict}, {every.verdict}). The token "
        f"itself ranks {before.value:.0f} of {before.n} keys; with the negative eigenvalues of S at 0 it ranks "
        f"{after.value:.0f} ({restored.verdict}). With random weights that takes it from {before.null:.0f} to "
        f"{after.null:.0f}."
    )


def _use(by_key: dict[str, Claim]) -> str:
    text, succession = by_key["remove.text"], by_key["remove.succession"]
    return (
        f"With its output at the mean, the loss over text changes by {_change(text)} nats, that of the next in a known "
        f"order by {_change(succession)}; other heads of the layer: {text.null:+.3f} and {succession.null:+.3f}."
    )


def _change(entry: Claim) -> str:
    low, high = (math.nan if end is None else end for end in (entry.low, entry.high))
    return f"{entry.value:+.3f} [{low:+.3f}, {high:+.3f}]"


def _join(names: Sequence[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
