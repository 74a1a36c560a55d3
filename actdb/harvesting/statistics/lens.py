"""Lens statistics: what each layer, and each head, already says about the next token, in nats.

The logit lens reads the residual stream after a layer through the final norm and the unembedding (nostalgebraist,
2020): p_l = softmax(norm(x_l) W_U + b_U); the last layer's is the model's own prediction p. Of each position:
kl = Σ p ln(p / p_l), and loss, entropy and rank of p_l as in the token statistics.

Direct logit attribution of a head to the token t[q+1] that follows: the head's output z[q] W_O through the linear part
of the final norm, with the size σ[q] that the norm divides by taken as it is, on the unembedding direction of the token
less the mean direction of the vocabulary, which no prediction depends on (Elhage et al., "A Mathematical Framework for
Transformer Circuits", 2021): z[q] W_O · centred(w ∘ (W_U[:, t[q+1]] − mean W_U)) / σ[q], averaged over q < n − 1.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from transformer_lens.hook_points import HookPoint

from actdb.errors import OverflowingError
from actdb.harvesting.capture import KEY_STEP, NO_TOKEN, PaddedBatch
from actdb.harvesting.statistics import Hook
from actdb.harvesting.statistics.tokens import NO_RANK, prediction_statistics
from actdb.unembedding import Readout

BLOCK_VALUES = 2**23
"""Logits held at once: 32 MiB, three times."""
COLUMNS = ("kl", "loss", "entropy", "rank", "top_token_id", "top_probability")


class LensStatistics:
    """Collects the lens statistics of one part.

    `residuals` are the points of resid_post by layer, the last one's among them; rows are kept of `layers`. `outputs`
    holds W_O [head, d_head, d_model] of the layers whose heads are attributed.
    """

    def __init__(
        self,
        residuals: Mapping[int, HookPoint],
        layers: Sequence[int],
        readout: Readout,
        z_points: Mapping[int, HookPoint],
        outputs: Mapping[int, torch.Tensor],
    ) -> None:
        self._residuals, self._layers, self._readout = residuals, sorted(layers), readout
        self._z_points = {layer: z_points[layer] for layer in sorted({*z_points} & {*outputs})}
        self._outputs = outputs
        self._mean_direction = readout.matrix.mean(1) if self._z_points else None
        self._seen: dict[int, torch.Tensor] = {}
        self._attributed: dict[int, torch.Tensor] = {}
        self._batch: PaddedBatch | None = None
        self._lens: list[tuple[torch.Tensor, ...]] = []
        self._keys: list[torch.Tensor] = []
        self._heads: list[torch.Tensor] = []
        self._prompts: list[tuple[int, ...]] = []

    def hooks(self, batch: PaddedBatch) -> list[Hook]:
        """Return hooks on the residual stream and z."""
        self._batch = batch
        hooks: list[Hook] = []
        for layer, point in self._residuals.items():

            def on_residual(tensor: torch.Tensor, layer: int = layer) -> None:
                self._seen[layer] = batch.rows(tensor).to(torch.float32, copy=True)

            hooks.append((point, on_residual))
        directions = self._directions(batch) if self._z_points else None
        for layer, point in self._z_points.items():

            def on_z(tensor: torch.Tensor, layer: int = layer) -> None:
                z = batch.rows(tensor).to(torch.float32)  # [row, head, d_head]
                written = torch.einsum("rm,hdm->rhd", directions, self._outputs[layer])
                self._attributed[layer] = torch.linalg.vecdot(z, written)

            hooks.append((point, on_z))
        return hooks

    def _directions(self, batch: PaddedBatch) -> torch.Tensor:
        """Return what a head's output is multiplied by for its attribution, before the norm divides: [row, d_model]."""
        readout, norm = self._readout, self._readout.norm
        token = batch.following().clamp_min(0)
        directions = readout.matrix.index_select(1, token).T - self._mean_direction
        directions = directions if norm.scale is None else directions * norm.scale
        return norm.centred(directions)  # type: ignore[no-any-return]

    def collect(self) -> None:
        """Read every layer of the batch out, in blocks of rows, so that few logits are held at once."""
        batch = self._batch
        assert batch is not None
        final = self._seen[max(self._residuals)]
        following, n = batch.following(), max(1, BLOCK_VALUES // self._readout.n_tokens)
        for begin in range(0, len(final), n):
            rows = slice(begin, begin + n)
            self._read_out(final[rows], rows, following[rows])
            self._keys.append(batch.keys[rows])
        if self._attributed:
            layers = torch.stack([self._attributed.pop(layer) for layer in self._z_points], dim=1)
            self._heads.append(self._means(layers / self._readout_size(final), following, batch))
            self._prompts.append(batch.prompt_ids)
        self._seen.clear()

    def _readout_size(self, final: torch.Tensor) -> Any:
        size = self._readout.norm.size(final)
        return size if isinstance(size, int) else size[..., None]

    def _read_out(self, final: torch.Tensor, rows: slice, following: torch.Tensor) -> None:
        own = self._readout.logits(final).log_softmax(-1)
        p = own.exp()
        found = []
        for layer in self._layers:
            logits = self._readout.logits(self._seen[layer][rows])
            loss, entropy, rank = prediction_statistics(logits, following)
            log_p = logits.log_softmax(-1)
            top = log_p.max(-1)
            kl = (own - log_p).mul_(p).sum(-1).clamp_min(0)
            found.append((kl, loss, entropy, rank, top.indices, top.values.exp()))
        self._lens.append(tuple(torch.stack(column, dim=1) for column in zip(*found, strict=True)))  # [row, layer]

    def _means(self, values: torch.Tensor, following: torch.Tensor, batch: PaddedBatch) -> torch.Tensor:
        """[row, layer, head] → [prompt, layer, head] means over the rows that a token follows; NaN without any."""
        prompt = torch.repeat_interleave(
            torch.arange(len(batch.lengths), device=values.device), batch.counts, output_size=len(values)
        )
        known = (following != NO_TOKEN).to(torch.float64)
        total = torch.zeros((len(batch.lengths), *values.shape[1:]), dtype=torch.float64, device=values.device)
        total.index_add_(0, prompt, values.to(torch.float64) * known[:, None, None])
        return total / (batch.counts - 1).to(torch.float64)[:, None, None]

    def tables(self) -> dict[str, Any]:
        """Return `lens_stats` and `head_attribution`; raises `OverflowingError` for logits not finite."""
        return {"lens_stats": self._lens_table(), "head_attribution": self._attribution_table()}

    def _lens_table(self) -> Any:
        import pyarrow as pa

        key = torch.cat(self._keys).cpu().numpy()
        columns = [torch.cat([block[i] for block in self._lens]).cpu().numpy() for i in range(len(COLUMNS))]
        if not np.isfinite(columns[COLUMNS.index("entropy")]).all():
            raise OverflowingError("the logit lens is not finite: the model itself overflows; try --dtype float32")
        order, n_layers = np.argsort(key), len(self._layers)
        prompt, pos = divmod(np.repeat(key[order], n_layers), KEY_STEP)
        values = {name: column[order].reshape(-1) for name, column in zip(COLUMNS, columns, strict=True)}
        last = values["rank"] == NO_RANK
        return pa.table(
            {
                "prompt_id": prompt.astype(np.int32),
                "layer": np.tile(np.asarray(self._layers, np.int32), len(key)),
                "pos": pos.astype(np.int32),
                "kl": values["kl"],
                "loss": pa.array(values["loss"], mask=last),
                "entropy": values["entropy"],
                "rank": pa.array(values["rank"].astype(np.int32), mask=last),
                "top_token_id": values["top_token_id"].astype(np.int32),
                "top_probability": values["top_probability"],
            }
        )

    def _attribution_table(self) -> Any:
        import pyarrow as pa

        schema = pa.schema(
            [("prompt_id", pa.int32()), ("layer", pa.int32()), ("head", pa.int32()), ("value", pa.float32())]
        )
        if not self._heads:
            return schema.empty_table()
        values = torch.cat(self._heads).cpu().numpy()  # [prompt, layer, head]
        prompts = np.concatenate([np.asarray(ids, np.int32) for ids in self._prompts])
        order = np.argsort(prompts)
        n_prompts, n_layers, n_heads = values.shape
        flat = values[order].reshape(-1).astype(np.float32)
        return pa.table(
            {
                "prompt_id": np.repeat(prompts[order], n_layers * n_heads),
                "layer": np.tile(np.repeat(np.asarray([*self._z_points], np.int32), n_heads), n_prompts),
                "head": np.tile(np.arange(n_heads, dtype=np.int32), n_prompts * n_layers),
                "value": pa.array(flat, mask=np.isnan(flat)),
            },
            schema=schema,
        )
