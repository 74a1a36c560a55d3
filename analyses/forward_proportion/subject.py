"""What is studied: a run whose prompts carry a label, and the model that it came from, where one is to be run."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import actdb

Ints = npt.NDArray[np.int64]
SITES = ("resid_post", "z", "pattern")
LEAST_PROMPTS = 10
SYMBOLIC = ("coding", "math")


@dataclass(frozen=True)
class Subject:
    """A run with the label of its prompts; `prompts` [prompt] are ids, `category` [prompt] places in `names`.

    Prompts without the label, and categories of fewer than `LEAST_PROMPTS`, are left out. `model` is None where no
    model is at hand; then nothing is perturbed or patched.
    """

    path: Path
    run: actdb.Run
    label: str
    prompts: Ints
    category: Ints
    names: tuple[str, ...]
    model: Any

    @property
    def symbolic(self) -> npt.NDArray[np.bool_]:
        """Whether each prompt is of a symbolic task, coding or math."""
        return np.isin(np.array(self.names)[self.category], SYMBOLIC)

    @property
    def shape(self) -> tuple[int, int]:
        """Layers and heads."""
        return len(self.run["z"].layers), self.run["z"].shape[1]

    def head_names(self) -> list[str]:
        """Return the names of the heads, layer after layer."""
        layers, n_heads = self.run["z"].layers, self.shape[1]
        return [f"{layer}.{head}" for layer in layers for head in range(n_heads)]


def make_subject(db: actdb.Database, run: actdb.Run, *, label: str, model: Any = None) -> Subject:
    """Read the labels of a run's prompts; raises `SettingError` where the run or its labels do not serve."""
    missing = [site for site in SITES if site not in run]
    if missing or run.info.plan.get("positions") == "last":
        raise actdb.SettingError(
            f"run {run.name!r} lacks {', '.join(missing) or 'all positions but the last'}: harvest with --sites "
            f"{','.join(SITES)} --positions all"
        )
    values = _labels(db, run, label)
    counts = {name: sum(value == name for value in values.values()) for name in values.values()}
    names = tuple(sorted(name for name, count in counts.items() if count >= LEAST_PROMPTS))
    if len(names) < 2:
        raise actdb.SettingError(
            f"label {label!r} of run {run.name!r} has {len(names)} categories of {LEAST_PROMPTS} prompts or more; two "
            "are needed"
        )
    prompts = np.array([prompt for prompt in run.prompt_ids() if values.get(prompt) in names], np.int64)
    category = np.array([names.index(values[prompt]) for prompt in prompts.tolist()], np.int64)
    return Subject(db.path, run, label, prompts, category, names, model)


def _labels(db: actdb.Database, run: actdb.Run, label: str) -> dict[int, str]:
    """Return the label of each prompt that has one, as text."""
    held = [str(name) for name, *_ in db.sql("DESCRIBE prompts").fetchall()]
    if label not in held:
        known = ", ".join(name for name in held if name not in ("prompt_set", "prompt_id", "text")) or "none"
        raise actdb.SettingError(f"the prompts of {db.path} have no label {label!r}; their labels: {known}")
    quoted = '"' + label.replace('"', '""') + '"'
    rows = db.sql(
        f"SELECT prompt_id, CAST({quoted} AS VARCHAR) FROM prompts JOIN runs USING (prompt_set)"
        f" WHERE run = $1 AND {quoted} IS NOT NULL",
        [run.name],
    ).fetchall()
    return {int(prompt): str(value) for prompt, value in rows}


def surface(db: actdb.Database, subject: Subject) -> npt.NDArray[np.float64]:
    """Return what a prompt gives away without being understood [prompt, 4]: tokens, characters, marks, digits.

    Characters, marks and digits are of its text, 0 for prompts that were given as tokens.
    """
    rows = db.sql(
        "SELECT prompt_id, n_tokens, length(coalesce(text, '')),"
        " len(regexp_extract_all(coalesce(text, ''), '[^\\w\\s]')),"
        " len(regexp_extract_all(coalesce(text, ''), '[0-9]'))"
        " FROM run_prompts JOIN runs USING (run) JOIN prompts USING (prompt_set, prompt_id) WHERE run = $1",
        [subject.run.name],
    ).fetchall()
    found = {int(prompt): values for prompt, *values in rows}
    return np.array([found[prompt] for prompt in subject.prompts.tolist()], np.float64)
