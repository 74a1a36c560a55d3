"""What an intervention does to the head and to the model, read from the statistics of a harvest by SQL."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

import actdb
from analyses.common.significance import Estimate, mean_interval

Floats = npt.NDArray[np.float64]
LABELLED = "JOIN runs USING (run) JOIN prompts USING (prompt_set, prompt_id)"
SELF_MASS = f"""
    SELECT self_mass FROM head_stats {LABELLED}
    WHERE run = $1 AND layer = $2 AND head = $3 AND kind = 'words' ORDER BY prompt_id
"""
TEXT_LOSS = f"""
    SELECT avg(loss) FROM token_stats {LABELLED}
    WHERE run = $1 AND kind = 'text' AND loss IS NOT NULL GROUP BY prompt_id ORDER BY prompt_id
"""
SUCCESSION_LOSS = f"""
    SELECT loss FROM token_stats {LABELLED} JOIN run_prompts USING (run, prompt_id)
    WHERE run = $1 AND kind = 'succession' AND pos = n_tokens - 2 ORDER BY prompt_id
"""


@dataclass(frozen=True)
class Behaviour:
    """A head's attention to the token itself, a value a word prompt; losses in nats, a value a prompt each.

    `text` is the mean loss of a text's tokens, `succession` that of the word that comes next in a known order.
    """

    self_mass: Floats
    text: Floats
    succession: Floats

    def change(self, plain: "Behaviour") -> "Change":
        """Return the paired changes from the model as it is, with intervals over prompts."""
        return Change(
            mean_interval(self.self_mass - plain.self_mass),
            mean_interval(self.text - plain.text),
            mean_interval(self.succession - plain.succession),
        )


@dataclass(frozen=True)
class Change:
    """Mean changes of self-attention, of the loss over text and of that in successions."""

    self_mass: Estimate
    text: Estimate
    succession: Estimate


def read_behaviour(db: actdb.Database, run: str, *, layer: int, head: int) -> Behaviour:
    """Read a run of `Head.harvest_behaviour` by SQL."""

    def column(query: str, *parameters: Any) -> Floats:
        return np.array([value for (value,) in db.sql(query, [run, *parameters]).fetchall()], np.float64)

    return Behaviour(column(SELF_MASS, layer, head), column(TEXT_LOSS), column(SUCCESSION_LOSS))
