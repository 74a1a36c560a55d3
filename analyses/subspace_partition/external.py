"""Models of the decompiled-transformers format: GPT-2 folders trained to copy, harvested with their earlier steps.

A folder holds `config.json` and `model.safetensors` (GPT2LMHeadModel, tied embedding), `step-N` folders the same of
earlier steps. Data tokens are 0 … V − 5, then come bos, sep, eos and pad; a prompt is `bos x sep x eos`. Weights are
read from safetensors alone: `training_args.bin`, a pickle that runs what it likes when loaded, is never opened.
"""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import actdb
from analyses.common.intervention import mean_ablation
from analyses.common.significance import Estimate
from analyses.subspace_partition.copying import FLOAT32, HeadScore, exact_match, score_heads

N_SPECIAL = 4
SPECIAL = ("bos", "sep", "eos", "pad")
STEP = re.compile(r"step-(\d+)")
ACCURACY = re.compile(r"eval_len(\d+)-(\d+)_acc:\s*([0-9.]+)")
SITES = ("resid_pre", "resid_mid", "resid_post", "z", "pattern")
PREVIOUS, INDUCTION = 0.4, 0.4
"""Mean masses from which on a head counts as one: those of the view `head_roles`."""
REDUNDANT = 0.01
"""A head without which no more than this share of prompts goes wrong is redundant."""


@dataclass(frozen=True)
class External:
    """A folder of the format: where its tokens are, how long prompts may be, and which steps it has.

    `claimed` are the accuracies that its `acc.txt` states, by the range of lengths.
    """

    folder: Path
    n_data: int
    n_context: int
    steps: tuple[int, ...]
    claimed: dict[tuple[int, int], float]

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.folder.resolve().name

    @property
    def longest(self) -> int:
        """The longest list of unique tokens that fits the context twice, with its three signs."""
        return min(self.n_data, (self.n_context - 3) // 2)

    def prompts(self, n: int, *, lengths: tuple[int, int], seed: int) -> list[dict[str, Any]]:
        """Return prompts `bos x sep x eos`, x unique data tokens, lengths spread evenly over a range, ends included.

        Labels: `list_length`, and `known_from`, `known_to`: the positions whose next token is known, from sep to the
        last of x, after which comes eos. Raises `SettingError` for lengths that do not fit.
        """
        shortest, longest = lengths
        if not 1 <= shortest <= longest <= self.longest:
            raise actdb.SettingError(f"lists of {shortest} to {longest}: {self.name} takes 1 to {self.longest}")
        generator = np.random.default_rng((seed, 37))
        bos, sep, eos = (self.n_data + i for i in range(3))
        found = []
        for length in np.resize(np.arange(shortest, longest + 1), n).tolist():
            data = generator.permutation(self.n_data)[:length].tolist()
            labels = {"list_length": length, "known_from": length + 1, "known_to": 2 * length + 2}
            found.append({"tokens": [bos, *data, sep, *data, eos], **labels})
        return found

    def text(self, token: int) -> str:
        """The text of a token: a number, or the sign's name."""
        return str(token) if token < self.n_data else SPECIAL[token - self.n_data]


def read_external(folder: str | Path) -> External:
    """Read what a folder says of itself; raises `ModelError` where it is not of the format. Loads no weights."""
    root = Path(folder)
    path = root / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        vocabulary, context = int(config["vocab_size"]), int(config["n_positions"])
        signs = [int(config[f"{name}_token_id"]) for name in ("bos", "eos", "pad")]
        kind = config["model_type"]
    except (OSError, ValueError, KeyError, TypeError) as exc:
        raise actdb.ModelError(f"{path} does not describe a decompiled-transformers model: {exc}") from exc
    first = vocabulary - N_SPECIAL
    if kind != "gpt2" or signs != [first, first + 2, first + 3] or first < 1:
        raise actdb.ModelError(
            f"{path}: model_type {kind!r} with bos, eos, pad {signs} of {vocabulary} tokens is not of the format: it is"
            " gpt2, and its last four tokens are bos, sep, eos, pad"
        )
    matches = ((STEP.fullmatch(entry.name), entry) for entry in root.iterdir() if entry.is_dir())
    steps = sorted(int(match[1]) for match, entry in matches if match and (entry / "config.json").is_file())
    return External(root, first, context, tuple(steps), _claimed(root / "acc.txt"))


def harvest_external(
    external: External, db: Path, *, n_prompts: int, lengths: tuple[int, int], seed: int
) -> list[actdb.Run]:
    """Harvest the folder's steps and its final weights on the same prompts; the final run comes last.

    Runs are `<name>-step<N>` and `<name>`; the folder does not say at which step it ended, so that the last one has
    none.
    """
    prompts = external.prompts(n_prompts, lengths=lengths, seed=seed)
    sources: list[tuple[Path, int | None]] = [(external.folder / f"step-{step}", step) for step in external.steps]
    runs = []
    for source, step in [*sources, (external.folder, None)]:
        name = external.name if step is None else f"{external.name}-step{step}"
        options: dict[str, Any] = {**FLOAT32, "sites": SITES, "stats": ("heads", "tokens")}
        runs.append(actdb.harvest(str(source), prompts, out=db, run=name, step=step, **options))
    return runs


def harvest_lengths(external: External, db: Path, *, n_prompts: int, seed: int) -> actdb.Run:
    """Harvest the final weights on lists of all lengths, as run `<name>-lengths`: statistics alone, no activations."""
    prompts = external.prompts(n_prompts, lengths=(1, external.longest), seed=seed + 1)
    options: dict[str, Any] = {"sites": "none", "stats": ("tokens",)}
    return actdb.harvest(str(external.folder), prompts, out=db, run=f"{external.name}-lengths", **options)


@dataclass(frozen=True)
class HeadUse:
    """A head's scores, and the share of prompts copied exactly with its output at its mean."""

    score: HeadScore
    without: Estimate
    intact: Estimate

    @property
    def verdict(self) -> str:
        """What the head is: redundant where copying does not need it, else by its attention."""
        if self.intact.value - self.without.value <= REDUNDANT:
            return "redundant"
        if self.score.induction >= INDUCTION:
            return "induction head"
        return "previous-token head" if self.score.previous >= PREVIOUS else "needed"


def measure_heads(model: Any, run: actdb.Run, db: Path) -> list[HeadUse]:
    """Score every head of a run, and harvest the run's prompts without each: runs `<run>-without-L1H0`.

    A head's z is put at its mean over all stored rows of the run.
    """
    prompts = list(_prompts_of(db, run))
    with actdb.open(db) as held:
        intact = exact_match(held, run.name)
        scores = score_heads(held, run)
    found = []
    for score in scores:
        hook = mean_ablation(run, "z", layer=score.layer, head=score.head)
        name = f"{run.name}-without-{score.name}"
        options: dict[str, Any] = {
            **FLOAT32,
            "sites": ("resid_post",),
            "stats": ("tokens",),
            "hooks_id": f"mean {score.name}",
        }
        actdb.harvest(model, prompts, out=db, run=name, hooks=[hook], step=run.step, **options)
        with actdb.open(db) as held:
            found.append(HeadUse(score, exact_match(held, name), intact))
    return found


def accuracy_by_length(db: actdb.Database, run: str, ranges: Sequence[tuple[int, int]]) -> list[Estimate]:
    """Return the share of lists copied exactly, for each range of lengths, ends included."""
    return [exact_match(db, run, where=f"p.list_length BETWEEN {low:d} AND {high:d}") for low, high in ranges]


def _prompts_of(db: Path, run: actdb.Run) -> Iterator[dict[str, Any]]:
    """The prompts of a run with their ranges, to harvest them again."""
    query = (
        "SELECT prompt_id, known_from, known_to FROM prompts JOIN runs r USING (prompt_set) WHERE r.run = $1 ORDER BY 1"
    )
    with actdb.open(db) as held:
        rows = held.sql(query, [run.name]).fetchall()
    for prompt, begin, end in rows:
        yield {"tokens": run.tokens(prompt).tolist(), "known_from": begin, "known_to": end}


def _claimed(path: Path) -> dict[tuple[int, int], float]:
    if not path.is_file():
        return {}
    text = path.read_text(encoding="utf-8", errors="replace")
    return {(int(low), int(high)): float(value.rstrip(".")) for low, high, value in ACCURACY.findall(text)}
