"""Statistics of a stored run: its arrays pass the collectors of a harvest again, without the model.

The collectors see what hooks would show them, as it was stored; so the figures agree with those of a harvest to the
stored precision. Parts are independent: each is committed by a file of its own, and the same call goes on where an
interrupted one stopped, and computes damaged ones anew.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformer_lens.hook_points import HookPoint

from actdb.errors import SelectionError, SettingError
from actdb.harvesting.capture import PaddedBatch, pad_batch
from actdb.harvesting.statistics.choice import Constants, Points, make_statistics
from actdb.schema import STATISTICS, Commit
from actdb.storage import commits, verify
from actdb.storage.folder import Folder, write_error
from actdb.unembedding import Readout

if TYPE_CHECKING:
    from actdb.run import Run

BATCH_TOKENS = 2048
LOGIT_VALUES = 2**25
"""Logits of a batch at once where token statistics need them: 128 MiB."""
LOGITS, FINAL = "logits", "final"
NEEDED = {"heads": ("pattern", "z"), "neurons": ("mlp_post",), "lens": ("resid_post",)}


def compute_statistics(
    folder: Folder, run: "Run", names: Sequence[str], *, progress: Callable[[int, int], None] | None = None
) -> list[str]:
    """Compute statistics of a run's committed parts from its arrays; returns the kinds that were not there before.

    Kinds that the harvest computed, and parts that have a kind already, are left as they are. `progress` is called
    with the parts done and all parts. Raises `SettingError` for a kind whose activations or weights are not stored,
    naming the option that stores them.
    """
    for name in names:
        if name not in STATISTICS:
            raise SettingError(f"--stats {name}: choose one of {', '.join(STATISTICS)}")
    wanted = [name for name in STATISTICS if name in names and name not in run.snapshot.harvested]
    missing = {name: _missing_parts(folder, run, name) for name in wanted}
    parts = sorted({part for found in missing.values() for part in found})
    if not parts:
        return []
    replay = Replay.make(run, [name for name in wanted if missing[name]])
    try:
        for i, part in enumerate(parts):
            _compute_part(folder, replay, part, [name for name in replay.names if part in missing[name]])
            if progress is not None:
                progress(i + 1, len(parts))
    except OSError as exc:
        raise write_error(exc, str(folder.root)) from exc
    return list(replay.names)


def _missing_parts(folder: Folder, run: "Run", name: str) -> list[int]:
    """Return the committed parts that lack a kind of statistics, or hold it damaged."""
    done = commits.committed_statistics(folder, run.name).get(name, [])
    damaged = [part for part in done if any(verify.check_statistics(folder, run.info, part, name))]
    return [part for part in run.snapshot.parts if part not in done or part in damaged]


def _compute_part(folder: Folder, replay: "Replay", part: int, names: Sequence[str]) -> None:
    tables = replay.part_tables(part, names)
    for name, held in tables.items():
        records = [commits.write_table(folder, replay.run.name, part, table, rows) for table, rows in held.items()]
        commit = Commit(part, replay.run.info.plan_hash, tuple(records), {})
        commits.write_statistics(folder, replay.run.name, name, commit)


@dataclass(frozen=True)
class Replay:
    """A run whose arrays are shown to collectors: hook points that nothing runs through stand for its sites."""

    run: "Run"
    names: tuple[str, ...]
    constants: Constants
    points: Points
    sources: dict[int, tuple[str, int | None]] = field(default_factory=dict)
    """Site and layer by the identity of a hook point."""

    @classmethod
    def make(cls, run: "Run", names: Sequence[str]) -> "Replay":
        """Check that what the statistics need is stored, and load the weights that they use."""
        if run.info.plan.get("positions") == "last":
            raise SettingError(f"run {run.name!r} stores the last position alone; harvest with --positions all")
        for name in names:
            for site in NEEDED.get(name, ()):
                if site not in run:
                    raise SettingError(
                        f"--stats {name} needs site {site}, which run {run.name!r} does not store; harvest with "
                        f"--sites {','.join([*run.sites, site])} or with --stats {name}"
                    )
        sources: dict[int, tuple[str, int | None]] = {}

        def points(site: str, layers: Sequence[int]) -> dict[int, HookPoint]:
            made = {layer: HookPoint() for layer in layers}
            sources.update({id(point): (site, layer) for layer, point in made.items()})
            return made

        held = {site: tuple(spec.layers) for site in run.sites if (spec := run.info.site(site)) is not None}
        logits = HookPoint() if "tokens" in names else None
        if logits is not None:
            sources[id(logits)] = (LOGITS if LOGITS in run else FINAL, None)
        if "lens" in names or ("tokens" in names and LOGITS not in run):
            _check_final(run, "lens" if "lens" in names else "tokens")
        constants = _constants(run, names)
        chosen = Points(
            patterns=points("pattern", held["pattern"]) if "heads" in names else {},
            z=points("z", held["z"]) if {"heads", "lens"} & {*names} and "z" in run else {},
            neurons=points("mlp_post", held["mlp_post"]) if "neurons" in names else {},
            residuals=points("resid_post", held["resid_post"]) if "lens" in names else {},
            logits=logits,
        )
        return cls(run, tuple(names), constants, chosen, sources)

    def part_tables(self, part: int, names: Sequence[str]) -> dict[str, dict[str, Any]]:
        """Return the tables by kind of statistics and name of one part."""
        layers = sorted(self.points.residuals)
        collectors = dict(zip(names, make_statistics(names, self.points, self.constants, layers), strict=True))
        for batch in self._batches(part):
            calls: dict[int, list[Callable[[torch.Tensor], None]]] = {}
            for collector in collectors.values():
                for point, function in collector.hooks(batch):
                    calls.setdefault(id(point), []).append(function)
            with torch.inference_mode():
                for key, functions in calls.items():
                    tensor = self._padded(*self.sources[key], batch)
                    for function in functions:
                        function(tensor)
                for collector in collectors.values():
                    collector.collect()
        return {name: dict(collector.tables()) for name, collector in collectors.items()}

    def _batches(self, part: int) -> Iterator[PaddedBatch]:
        """Yield a part's prompts in storage order, in batches of a bounded number of tokens with their pads."""
        index = self.run.prompt_index
        prompts = index.in_storage_order(np.flatnonzero(index.part == part))
        limit = BATCH_TOKENS
        if self.points.logits is not None:
            limit = max(1, min(limit, LOGIT_VALUES // int(self.run.info.model.get("d_vocab") or 1)))
        group: list[int] = []
        for prompt in prompts.tolist():
            longest = max(int(index.n_tokens[p]) for p in (*group, prompt))
            if group and longest * (len(group) + 1) > limit:
                yield self._batch(group)
                group = []
            group.append(prompt)
        if group:
            yield self._batch(group)

    def _batch(self, prompts: Sequence[int]) -> PaddedBatch:
        return pad_batch(
            [np.array(self.run.tokens(prompt)) for prompt in prompts],
            device=torch.device("cpu"),
            masked=False,
            causal=self.run.info.causal,
            positions="all",
            packed=False,
            prompt_ids=prompts,
        )

    def _padded(self, site: str, layer: int | None, batch: PaddedBatch) -> Any:
        """Return an activation of a batch as a hook would show it, zeros in the pads."""
        if site == FINAL:
            readout, last = self.constants.readout, self.run.info.model["n_layers"] - 1
            assert readout is not None
            return readout.logits(self._padded("resid_post", last, batch))
        selection = self.run[site].sel(prompt=list(batch.prompt_ids))
        selection = selection if layer is None else selection.sel(layer=layer)
        longest = max(batch.lengths)
        if site == "pattern":
            squares = selection.numpy()
            out = torch.zeros((len(squares), len(squares[0]), longest, longest))
            for target, square in zip(out, squares, strict=True):
                n = square.shape[-1]
                target[:, :n, :n] = torch.from_numpy(np.array(square))
            return out
        rows = torch.from_numpy(np.asarray(selection.numpy(), np.float32))
        rows = rows.transpose(0, 1) if rows.ndim == 3 else rows  # [row, head, d_head]
        if batch.tokens is None:
            return rows.unflatten(0, (len(batch.lengths), longest))
        out = torch.zeros((len(batch.lengths) * longest, *rows.shape[1:]))
        out[batch.tokens] = rows
        return out.unflatten(0, (len(batch.lengths), longest))


def _check_final(run: "Run", name: str) -> None:
    """Raise `SettingError` unless predictions can be read from the last layer's residual stream."""
    spec, n_layers = run.info.site("resid_post"), run.info.model.get("n_layers")
    if spec is None or n_layers is None or n_layers - 1 not in spec.layers:
        raise SettingError(
            f"--stats {name} reads predictions from resid_post of the last layer, which run {run.name!r} does not "
            f"store; harvest with --sites {','.join({**dict.fromkeys(run.sites), 'resid_post': None})} and every "
            f"layer, or with --stats {name}"
        )
    if not run.info.causal:
        raise SettingError(f"--stats {name}: the model of run {run.name!r} looks both ways and predicts no next token")


def _constants(run: "Run", names: Sequence[str]) -> Constants:
    """Load what the statistics take from the weights kept with the run."""
    outputs: dict[int, torch.Tensor] = {}
    if {"heads", "lens"} & {*names} and (spec := run.info.site("z")) is not None:
        for layer in spec.layers:
            try:
                weight = run.torch_weight("W_O", layer=layer).to(torch.float32)
            except SelectionError:  # a model that names its output weights otherwise: norms of results stay null
                continue
            if weight.ndim == 3:
                outputs[layer] = weight
    readout = None
    if "lens" in names or ("tokens" in names and LOGITS not in run):
        try:
            readout = Readout.of_run(run, lambda name: run.torch_weight(name).to(torch.float32))
        except SelectionError as exc:
            raise SettingError(f"--stats {'lens' if 'lens' in names else 'tokens'}: {exc}") from exc
    return Constants(
        grams={layer: weight @ weight.transpose(1, 2) for layer, weight in outputs.items()},
        outputs=outputs,
        readout=readout,
    )
