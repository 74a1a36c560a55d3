"""Copy transformers: small attention-only models trained to repeat a pattern, their checkpoints stored as runs.

To copy a pattern of unique tokens takes two heads (Olsson et al. 2022, "In-context Learning and Induction Heads"): one
that brings each position the token before it, and after it one that looks for the position whose token before is the
present token, and copies what stands there. After the first layer the residual stream therefore holds two variables,
"this token" and "previous token": the known answer of a partition into subspaces.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional
from transformer_lens.config import TransformerBridgeConfig
from transformer_lens.model_bridge.sources.native import boot

import actdb
from analyses.common.significance import Estimate, proportion_interval
from analyses.common.training import harvest_steps, train
from analyses.subspace_partition.sequence import Task, copy_prompts, draw_patterns, paired_prompts, repeat

WARMUP_STEPS = 200
SITES = ("resid_pre", "resid_post", "z", "pattern")
"""What each checkpoint keeps: the stream before and after each layer, and what the heads did."""
FLOAT32: dict[str, Any] = {"store": "float32", "processing": "raw"}
"""Rows are compared by small distances, and centred or folded weights would change them: kept as computed."""
EXACT = """
    SELECT sum(exact), count(*) FROM (
        SELECT min(CASE WHEN t.rank = 0 THEN 1 ELSE 0 END) AS exact
        FROM token_stats t JOIN runs r USING (run)
            JOIN prompts p ON p.prompt_set = r.prompt_set AND p.prompt_id = t.prompt_id
        WHERE t.run = $1 AND t.pos >= p.known_from AND t.pos < p.known_to AND ({where}) GROUP BY t.prompt_id)
"""


@dataclass(frozen=True)
class Copier:
    """A copy transformer and its training; everything follows from these values.

    `positions` is standard (learned, added to the stream) or rotary (turns queries and keys, and leaves the stream).
    """

    name: str
    task: Task
    d_model: int = 16
    n_heads: int = 1
    positions: str = "standard"
    n_steps: int = 8000
    batch: int = 64
    learning_rate: float = 3e-3
    weight_decay: float = 0.0
    seed: int = 0

    def build(self) -> Any:
        """Return the untrained model: two layers of attention alone with LayerNorm, as a TransformerLens bridge."""
        shape: dict[str, Any] = {
            "n_layers": 2,
            "d_model": self.d_model,
            "n_heads": self.n_heads,
            "d_head": self.d_model // self.n_heads,
            "n_ctx": self.task.n_context,
            "d_vocab": self.task.n_tokens + 1,
            "attn_only": True,
            "normalization_type": "LN",
            "positional_embedding_type": self.positions,
        }
        with torch.random.fork_rng(devices=[]):
            return boot(TransformerBridgeConfig(**shape, seed=self.seed, device="cpu"), model_name=self.name)

    def batch_at(self, step: int) -> torch.Tensor:
        """Return the sequences [batch, pos] of a training step: patterns of one length, drawn for this step."""
        generator = np.random.default_rng((self.seed, 33, step))
        shortest, longest = self.task.lengths
        length = int(generator.integers(shortest, longest + 1))
        return torch.from_numpy(repeat(draw_patterns(self.task, generator, self.batch, length)))

    def loss(self, model: Any, step: int) -> torch.Tensor:
        """Return the mean cross-entropy, in nats, of the tokens of the repeat that can be known."""
        ids = self.batch_at(step)
        begin, end = self.task.known(ids.shape[1] // 2)
        logits = model.original_model(ids)[:, begin:end]  # [batch, known, token]
        return functional.cross_entropy(logits.flatten(0, 1), ids[:, begin + 1 : end + 1].flatten())


@dataclass(frozen=True)
class Trained:
    """A trained copy transformer, the loss of every step, and the names of its checkpoints' runs by step."""

    copier: Copier
    model: Any
    losses: npt.NDArray[np.float32]
    runs: Mapping[int, str]

    @property
    def run(self) -> str:
        """The run of the trained model."""
        return self.runs[max(self.runs)]


def train_copier(copier: Copier, db: Path, *, checkpoints: Sequence[int] = (), n_prompts: int = 256) -> Trained:
    """Train a copy transformer and harvest its checkpoints into a database, as runs `<name>-step<step>`.

    The last step is always one of them. The same call finds what is done, and goes on after a kill: the state stands
    beside the database. Prompts are the same at every checkpoint, and not those of the training.
    """
    steps = sorted({*checkpoints, copier.n_steps})
    model = copier.build()
    optimizer = torch.optim.AdamW(model.parameters(), lr=copier.learning_rate, weight_decay=copier.weight_decay)
    prompts = copy_prompts(copier.task, n_prompts, seed=copier.seed)
    losses = train(
        model,
        copier.loss,
        optimizer=optimizer,
        schedule=torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, copier.n_steps)),
        n_steps=copier.n_steps,
        clip=1.0,
        checkpoints=steps,
        visit=harvest_steps(model, prompts, db, run=copier.name, sites=SITES, stats=("heads", "tokens"), **FLOAT32),
        state=db.parent / f"{copier.name}.pt",
        identity={**asdict(copier), "task": str(copier.task)},
        name=copier.name,
    )
    model.eval().requires_grad_(False)
    return Trained(copier, model, losses, {step: f"{copier.name}-step{step}" for step in steps})


def harvest_rows(trained: Trained, db: Path, *, n_prompts: int) -> actdb.Run:
    """Harvest the residual stream after each layer on patterns that stand once, as run `<name>-rows`.

    It is what to partition: a prompt has as many rows as its pattern has tokens, and the start token's.
    """
    prompts = copy_prompts(trained.copier.task, n_prompts, seed=trained.copier.seed + 1, twice=False)
    options: dict[str, Any] = {**FLOAT32, "sites": ("resid_post",), "stats": ()}
    return actdb.harvest(trained.model, prompts, out=db, run=f"{trained.copier.name}-rows", **options)


def harvest_pairs(trained: Trained, db: Path, *, n_pairs: int, length: int) -> actdb.Run:
    """Harvest clean and corrupted prompts, as run `<name>-pairs`: the clean ones, then their partners."""
    prompts = paired_prompts(trained.copier.task, n_pairs, length=length, seed=trained.copier.seed + 2)
    options: dict[str, Any] = {**FLOAT32, "sites": SITES, "stats": ("tokens",)}
    return actdb.harvest(trained.model, prompts, out=db, run=f"{trained.copier.name}-pairs", **options)


def exact_match(db: actdb.Database, run: str, *, where: str = "true") -> Estimate:
    """Return the share of prompts whose every known token is predicted first, by SQL over `token_stats`.

    Prompts have the labels `known_from` and `known_to`; while all tokens so far are right, what the model generates is
    what it is given, so that this is the share of patterns that it copies exactly. `where` is SQL about a prompt `p`.
    """
    row = db.sql(EXACT.format(where=where), [run]).fetchone()
    right, n = row if row is not None else (0, 0)
    return proportion_interval(int(right or 0), int(n))


@dataclass(frozen=True)
class HeadScore:
    """What one head attends to, mean attention mass from 0 to 1, each over the queries that have such a key.

    previous: one position back. two_back: two. induction: the positions whose token before is the present token; of
    queries with known next tokens. The role is that of the view `head_roles`.
    """

    layer: int
    head: int
    previous: float
    two_back: float
    induction: float
    role: str | None

    @property
    def name(self) -> str:
        """The head as L1H0."""
        return f"L{self.layer}H{self.head}"


def score_heads(db: actdb.Database, run: actdb.Run, *, order: int = 1) -> list[HeadScore]:
    """Score every head of a run from its stored patterns; one pass over them.

    `order` 2 asks of an induction key that the two tokens before it be the present token and the one before: what
    copying patterns of unique pairs takes. Prompts have the labels `known_from` and `known_to`.
    """
    query = (
        "SELECT p.prompt_id, p.known_from, p.known_to FROM prompts p JOIN runs r USING (prompt_set) WHERE r.run = $1"
        " ORDER BY p.prompt_id"
    )
    sums: dict[str, npt.NDArray[np.float64]] = {}
    for prompt, begin, end in db.sql(query, [run.name]).fetchall():
        patterns = run["pattern"].sel(prompt=prompt).numpy().astype(np.float64)  # [layer, head, query, key]
        found = _masses(patterns, run.tokens(prompt), slice(begin, end), order)
        for name, (total, n) in found.items():
            sums[name] = sums.get(name, np.zeros((*total.shape, 2))) + np.stack([total, np.full_like(total, n)], -1)
    means = {name: total[..., 0] / np.maximum(total[..., 1], 1) for name, total in sums.items()}
    rows = db.sql("SELECT layer, head, role FROM head_roles WHERE run = $1", [run.name]).fetchall()
    roles = {(layer, head): role for layer, head, role in rows}
    return [
        HeadScore(
            layer, head, **{name: float(mean[i, head]) for name, mean in means.items()}, role=roles.get((layer, head))
        )
        for i, layer in enumerate(run["pattern"].layers)
        for head in range(means["previous"].shape[1])
    ]


def _masses(
    patterns: npt.NDArray[np.float64], tokens: npt.NDArray[Any], known: slice, order: int
) -> dict[str, tuple[npt.NDArray[np.float64], int]]:
    """Sums [layer, head] over queries of what each kind of key gets, and the number of queries."""
    n = patterns.shape[-1]
    back = {shift: np.trace(patterns, offset=-shift, axis1=2, axis2=3) for shift in (1, 2)}
    queries, keys = np.arange(n)[:, None], np.arange(n)[None, :]
    follows = (keys >= order) & (keys <= queries)  # [query, key]
    for shift in range(order):
        follows &= tokens[np.maximum(keys - 1 - shift, 0)] == tokens[np.maximum(queries - shift, 0)]
    asked = np.zeros(n, bool)
    asked[known] = follows[known].any(1)
    mass = (patterns * follows).sum(-1)[..., asked].sum(-1)
    return {
        "previous": (back[1], max(n - 1, 0)),
        "two_back": (back[2], max(n - 2, 0)),
        "induction": (mass, int(asked.sum())),
    }


def _rate(step: int, n_steps: int) -> float:
    """The learning rate's factor: up over the first steps, then down along a line."""
    return min((step + 1) / min(WARMUP_STEPS, n_steps), max(1 - step / n_steps, 0.02))
