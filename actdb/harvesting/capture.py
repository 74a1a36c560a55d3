"""Capture: hooks that turn one layer's activations of a padded batch into packed blocks, pads stripped.

All of it runs on the model's device; a block leaves it once, in the stored dtype and in the stored order.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformer_lens.hook_points import HookPoint

from actdb.harvesting.models import Model
from actdb.harvesting.sites import HarvestSite, attach, forward

TORCH_DTYPES = {
    "float16": torch.float16,
    "float32": torch.float32,
    "float64": torch.float64,
    "uint16": torch.uint16,
    "uint32": torch.uint32,
    "int64": torch.int64,
}
KEY_STEP = 2**31
NO_TOKEN = -1
Intervention = tuple[str, Callable[[torch.Tensor, HookPoint], torch.Tensor | None]]


@dataclass(frozen=True)
class PaddedBatch:
    """Right-padded ids [batch, pos] with their lengths, on the model's device.

    `counts` [batch] are the lengths there. `valid` holds the flat [batch × pos] indices of the stored rows, or None
    where all are; `packing` the flat [query × key] indices of the lower triangle (None: the whole square); `tokens`
    those of all rows without pads (None: there are none), and `keys` of each of these prompt_id × KEY_STEP + pos.
    """

    ids: torch.Tensor
    lengths: tuple[int, ...]
    counts: torch.Tensor
    mask: torch.Tensor | None
    valid: torch.Tensor | None
    packing: torch.Tensor | None
    last_only: bool
    prompt_ids: tuple[int, ...] = ()
    tokens: torch.Tensor | None = None
    keys: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))

    def rows(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the rows [row, …] of an activation [batch, pos, …], pads left out, stored or not."""
        rows = tensor.flatten(0, 1)
        return rows if self.tokens is None else rows.index_select(0, self.tokens)

    def following(self) -> torch.Tensor:
        """Return the token after each row [row], `NO_TOKEN` at the last position of a prompt."""
        shifted = torch.full_like(self.ids, NO_TOKEN)
        shifted[:, :-1] = self.ids[:, 1:]
        shifted[torch.arange(len(self.ids), device=shifted.device), self.counts - 1] = NO_TOKEN
        return self.rows(shifted)

    @property
    def n_tokens(self) -> int:
        """Tokens without pads."""
        return sum(self.lengths)


def pad_batch(
    prompts: Sequence[npt.NDArray[np.int32]],
    *,
    device: torch.device,
    masked: bool,
    causal: bool,
    positions: str,
    packed: bool,
    prompt_ids: Sequence[int] | None = None,
) -> PaddedBatch:
    """Pad prompts on the right and precompute what strips the pads again; with a mask where `masked`.

    The pad token is the id 0: its value never matters, since later positions do not reach earlier ones in a causal
    model and are masked in others.
    """
    lengths = tuple(len(prompt) for prompt in prompts)
    longest = max(lengths)
    ids = torch.zeros((len(prompts), longest), dtype=torch.long)
    for row, prompt in zip(ids, prompts, strict=True):
        row[: len(prompt)] = torch.from_numpy(prompt)
    counts = torch.tensor(lengths)
    inside = torch.arange(longest) < counts[:, None]
    last_only = positions == "last"
    tokens = None if bool(inside.all()) else inside.flatten().nonzero().squeeze(1)
    valid = torch.arange(len(prompts)) * longest + counts - 1 if last_only else tokens
    ids_of_prompts = tuple(range(len(prompts)) if prompt_ids is None else prompt_ids)
    keys = (torch.tensor(ids_of_prompts)[:, None] * KEY_STEP + torch.arange(longest))[inside]
    packing = None
    if packed and causal and not last_only:
        query, key = torch.tril_indices(longest, longest)
        packing = query * longest + key

    def send(tensor: torch.Tensor | None) -> Any:
        if tensor is None or device.type != "cuda":
            return None if tensor is None else tensor.to(device)
        return tensor.pin_memory().to(device, non_blocking=True)  # from other memory the copy would wait

    return PaddedBatch(
        ids=send(ids),
        lengths=lengths,
        counts=send(counts),
        mask=send(inside.long()) if masked else None,
        valid=send(valid),
        packing=send(packing),
        last_only=last_only,
        prompt_ids=ids_of_prompts,
        tokens=send(tokens),
        keys=send(keys),
    )


def pack(site: HarvestSite, tensor: torch.Tensor, batch: PaddedBatch, dtype: torch.dtype) -> torch.Tensor:
    """Return one layer's stored block of a batch: [head, row or entry, …] or [row, …], contiguous, in `dtype`.

    The block never shares memory with the activation, which the model may go on to change in place.
    """
    if site.transform is not None:
        tensor = top_entries(tensor, site.width, values=site.transform == "top_value")
    elif site.kind == "entry":
        return _own(_pack_entries(tensor.to(dtype), batch), tensor)
    if site.kind == "prompt":
        return _own(tensor.to(dtype).contiguous(), tensor)
    rows = tensor.flatten(0, 1)  # [batch·pos, …]
    if batch.valid is not None:
        rows = rows.index_select(0, batch.valid)
    rows = rows.to(dtype)
    if site.n_heads is not None:
        rows = rows.transpose(0, 1)  # [head, row, d_head]
    return _own(rows.contiguous(), tensor)


def _own(block: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """Return the block, copied where it still lies in the activation's memory."""
    return block.clone() if block.data_ptr() == tensor.data_ptr() else block


def _pack_entries(pattern: torch.Tensor, batch: PaddedBatch) -> torch.Tensor:
    """[batch, head, query, key] → [head, entry]: each prompt's triangle row by row, or its square, or its last row.

    The triangle of a shorter prompt is a prefix of the triangle of a longer one, so one gather serves all.
    """
    if batch.last_only:
        rows = [pattern[i, :, n - 1, :n] for i, n in enumerate(batch.lengths)]
        return torch.cat(rows, dim=1)
    n_heads = pattern.shape[1]
    uniform = len(set(batch.lengths)) == 1
    if batch.packing is None:
        if uniform:
            return pattern.transpose(0, 1).reshape(n_heads, -1).contiguous()
        return torch.cat([pattern[i, :, :n, :n].reshape(n_heads, -1) for i, n in enumerate(batch.lengths)], dim=1)
    by_head = pattern.transpose(0, 1)
    triangles = join_triangles(by_head) if pattern.device.type == "cpu" else gather_triangles(by_head, batch.packing)
    if uniform:
        return triangles.reshape(n_heads, -1)
    return torch.cat([triangles[:, i, : n * (n + 1) // 2] for i, n in enumerate(batch.lengths)], dim=1)


def join_triangles(square: torch.Tensor) -> torch.Tensor:
    """[…, query, key] → […, entry]: rows of the triangle as they lie; on a CPU 0.8 ms where gathering takes 2.5."""
    return torch.cat([square[..., query, : query + 1] for query in range(square.shape[-1])], dim=-1)


def gather_triangles(square: torch.Tensor, packing: torch.Tensor) -> torch.Tensor:
    """[…, query, key] → […, entry] by flat indices: one kernel on an accelerator."""
    return square.flatten(-2).index_select(-1, packing)


def top_entries(pattern: torch.Tensor, n: int, *, values: bool) -> torch.Tensor:
    """[batch, head, query, key] → [batch, query, head, n]: the largest weights of each query, or their keys.

    Weights come in descending order, ties by the lower key. Where there are fewer than n keys, the weight is 0 and the
    key −1 (stored as the largest value of the unsigned dtype).
    """
    n_keys = pattern.shape[-1]
    order = torch.sort(pattern, dim=-1, descending=True, stable=True)
    weights, keys = order.values[..., :n], order.indices[..., :n]
    keys = keys.masked_fill(weights <= 0, -1)
    if n_keys < n:
        weights = torch.nn.functional.pad(weights, (0, n - n_keys))
        keys = torch.nn.functional.pad(keys, (0, n - n_keys), value=-1)
    return (weights if values else keys).transpose(1, 2)


def run_batch(
    model: Model,
    batch: PaddedBatch,
    hooks: Sequence[tuple[HookPoint, Callable[[torch.Tensor], None]]],
    *,
    interventions: Sequence[Intervention] = (),
    unembed: bool = False,
    end: str | None = None,
) -> Any:
    """Run a batch once, interventions first, with each hook called on its point's activation; see `forward`."""
    with ExitStack() as stack:
        for name, function in interventions:
            attach(stack, model.hook_points[name], function)
        for point, receive in hooks:

            def observe(tensor: torch.Tensor, hook: Any, receive: Callable[[torch.Tensor], None] = receive) -> None:
                receive(tensor)

            attach(stack, point, observe)
        return forward(model, batch.ids, batch.mask, unembed=unembed, end=end)


def site_hooks(
    sites: Sequence[HarvestSite],
    batch: PaddedBatch,
    dtypes: Mapping[str, str],
    receive: Callable[[HarvestSite, int, torch.Tensor], None],
) -> list[tuple[HookPoint, Callable[[torch.Tensor], None]]]:
    """Return hooks that hand each site's packed block of each layer (by its place in the array) to `receive`."""
    hooks: list[tuple[HookPoint, Callable[[torch.Tensor], None]]] = []
    for site in sites:
        for index, point in enumerate(site.points):

            def hook(tensor: torch.Tensor, site: HarvestSite = site, index: int = index) -> None:
                receive(site, index, pack(site, tensor, batch, TORCH_DTYPES[dtypes[site.name]]))

            hooks.append((point, hook))
    return hooks
