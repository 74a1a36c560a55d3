"""Interventions outside a harvest: the same (hook name, function) pairs, kept on a model while a context is open."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch

from actdb.errors import ModelError, SettingError
from actdb.harvesting.capture import Intervention
from actdb.harvesting.models import evaluating, hook_points
from actdb.harvesting.sites import attach


@contextmanager
def hooked(module: torch.nn.Module, hooks: Sequence[Intervention]) -> Iterator[None]:
    """Keep interventions on a model's hook points, dropout out, while the context is open."""
    points = hook_points(module)
    if not points:
        raise ModelError(f"{type(module).__name__} has no hook points: it needs TransformerLens HookPoints")
    for name, _ in hooks:
        if name not in points:
            raise SettingError(f"hooks: {type(module).__name__} has no hook point {name!r}")
    with evaluating(module), ExitStack() as stack:
        for name, function in hooks:
            attach(stack, points[name], function)
        yield
