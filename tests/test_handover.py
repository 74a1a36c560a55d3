"""Handing over asynchronously gives the files that handing over at once gives; batches that do not fit are refused."""

import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hooked import TinyModel, files_of, random_prompts
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import actdb
from actdb.harvesting import trial
from actdb.harvesting.backlog import Backlog
from actdb.harvesting.capture import gather_triangles, join_triangles, pad_batch
from actdb.harvesting.handover import Handover
from actdb.harvesting.pipeline import PartWriter
from actdb.harvesting.statistics.heads import TokenTargets

PROMPTS = random_prompts(20)
PLAN: dict[str, Any] = {"part_tokens": 40, "batch_tokens": 24, "sites": ["z", "pattern", "resid_post"]}


@pytest.fixture
def asynchronous(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hand over as from an accelerator, without one: the copy is an ordinary one."""
    begin = Handover.__init__

    def init(self: Handover, device: torch.device, writers: Any) -> None:
        writers._lockstep = False
        begin(self, torch.device("meta"), writers)

    monkeypatch.setattr(Handover, "__init__", init)


@pytest.mark.usefixtures("asynchronous")
def test_the_same_files_either_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    actdb.harvest(TinyModel(), PROMPTS, tmp_path / "later", **PLAN)
    monkeypatch.undo()
    actdb.harvest(TinyModel(), PROMPTS, tmp_path / "at once", **PLAN)
    assert files_of(tmp_path / "later") == files_of(tmp_path / "at once")


@pytest.mark.usefixtures("asynchronous")
def test_a_slow_disk_holds_the_model_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks on their way never hold more than the buffer and one block."""
    most, append, reserve = 0, PartWriter.append, Backlog.reserve

    def slow(*given: Any) -> None:
        time.sleep(0.001)
        append(*given)

    def count(self: Backlog, kind: str, size: int, *, limit: int) -> None:
        nonlocal most
        reserve(self, kind, size, limit=limit)
        if self._thread.name == "actdb-handover":
            most = max(most, self.reserved(kind))

    monkeypatch.setattr(PartWriter, "append", slow)
    monkeypatch.setattr(Backlog, "reserve", count)
    monkeypatch.setattr("actdb.harvesting.execution.MEBIBYTE", 1000)
    run = actdb.harvest(TinyModel(), PROMPTS, tmp_path / "x", buffer_mb=1, **PLAN)
    largest = max(run[site].sel(layer=0).nbytes for site in run) // run.info.n_parts
    assert 1000 <= most < 1000 + 2 * largest
    assert run.status == "complete"


@pytest.mark.usefixtures("asynchronous")
def test_errors_behind_the_handover_reach_the_caller(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for target in ("PartWriter.append", "encode_chunks", "PartWriter.finish"):
        with monkeypatch.context() as patch:

            def broken(*_: Any, **__: Any) -> None:
                raise OSError(5, "Input/output error")

            patch.setattr(f"actdb.harvesting.pipeline.{target}", broken)
            with pytest.raises(OSError, match="Input/output error"):
                actdb.harvest(TinyModel(), PROMPTS, tmp_path / "x", **PLAN)
        assert not list((tmp_path / "x").rglob(".tmp-*")), target
        assert not [thread for thread in threading.enumerate() if thread.name.startswith(("actdb-wri", "actdb-hand"))]
    assert actdb.harvest(TinyModel(), PROMPTS, tmp_path / "x", **PLAN).status == "complete"


def test_blocks_do_not_share_memory_with_the_model(tmp_path: Path) -> None:
    """A model that goes on to change an activation in place changes nothing that is stored."""

    class InPlace(TinyModel):
        def forward(self, *args: Any, **options: Any) -> Any:
            handles = [block.hook_resid_post.register_forward_hook(_spoil) for block in self.blocks]
            try:
                return super().forward(*args, **options)
            finally:
                for handle in handles:
                    handle.remove()

    def _spoil(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        kept = output.clone()
        output.zero_()  # after the hooks have seen it
        return kept

    options = {**PLAN, "store": "float32"}
    spoiled = actdb.harvest(InPlace(), PROMPTS, tmp_path / "x", **options)
    wanted = actdb.harvest(TinyModel(), PROMPTS, tmp_path / "y", **options)
    for site in wanted:
        for prompt in range(0, 20, 7):
            assert (spoiled[site].sel(prompt=prompt).numpy() == wanted[site].sel(prompt=prompt).numpy()).all()
    assert wanted["resid_post"].numpy().any()


def test_batches_that_do_not_fit_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = [{"tokens": [1] * 8}] * 16
    monkeypatch.setattr(trial, "_available_bytes", lambda: 40_000)
    with pytest.raises(
        actdb.SettingError, match="a batch of 16 prompts of 8 tokens .* choose --batch-tokens 32"
    ) as said:
        actdb.harvest(TinyModel(), prompts, tmp_path / "x")
    assert not (tmp_path / "x").exists()
    fitting = int(str(said.value).rpartition("--batch-tokens ")[2].partition(",")[0])
    assert actdb.harvest(TinyModel(), prompts, tmp_path / "x", batch_tokens=fitting).status == "complete"
    monkeypatch.setattr(trial, "_available_bytes", lambda: 100)
    with pytest.raises(actdb.SettingError, match="one prompt of 8 tokens does not fit .* --max-length"):
        actdb.harvest(TinyModel(), prompts, tmp_path / "y")


def test_a_trial_batch_halves_until_it_fits(tmp_path: Path) -> None:
    """As on an accelerator: the batch runs, and where the memory is not enough a smaller one is tried."""

    class Small(TinyModel):
        def forward(self, ids: torch.Tensor, *args: Any, **options: Any) -> Any:
            if ids.numel() > 40:
                raise torch.OutOfMemoryError("out of memory")
            return super().forward(ids, *args, **options)

    from actdb.harvesting.harvest import plan_harvest
    from actdb.harvesting.settings import Settings

    planned = plan_harvest(Small(), [{"tokens": [1] * 8}] * 16, Settings())
    fits = trial._runs(planned)
    assert trial._largest_fitting(range(16), fits) == 4
    assert fits(range(5))
    assert not fits(range(6))


@pytest.mark.parametrize("sparse", [True, False])
def test_masses_do_not_depend_on_how_targets_are_held(sparse: bool) -> None:
    prompts = [torch.randint(0, 3, (n,), generator=torch.Generator().manual_seed(n)).numpy() for n in (2, 7, 5)]
    batch = pad_batch(prompts, device=torch.device("cpu"), masked=True, causal=True, positions="all", packed=True)
    pattern = torch.rand(3, 2, 7, 7, generator=torch.Generator().manual_seed(0))
    targets = TokenTargets(batch, sparse=sparse)
    for where, shift in ((targets.duplicate, 0), (targets.induction, 1)):
        mass = targets.mass(pattern, where)
        for prompt, tokens in enumerate(prompts):
            wanted = sum(
                pattern[prompt, :, q, k].double()
                for q in range(len(tokens))
                for k in range(shift, q + shift)
                if tokens[k - shift] == tokens[q]
            )
            assert torch.allclose(mass[prompt], torch.as_tensor(wanted), atol=1e-6)


@given(hnp.arrays(np.float16, hnp.array_shapes(min_dims=1, max_dims=3, max_side=4)), st.integers(1, 12))
def test_triangles_by_rows_and_by_gathering(leading: np.ndarray, n: int) -> None:
    square = torch.from_numpy(np.arange(leading.size * n * n, dtype=np.float32).reshape(*leading.shape, n, n))
    query, key = torch.tril_indices(n, n)
    joined = join_triangles(square)
    assert torch.equal(joined, gather_triangles(square, query * n + key))
    assert np.array_equal(joined.numpy(), square.numpy()[..., *np.tril_indices(n)])


def test_hooks_leave_nothing_behind(tmp_path: Path) -> None:
    """After a harvest no hook point keeps a hook: each would keep a part's statistics and writers alive."""
    model = TinyModel()
    actdb.harvest(model, PROMPTS, tmp_path / "x", **PLAN)
    points = [module for module in model.modules() if hasattr(module, "fwd_hooks")]
    assert len(points) > 10
    assert not [point for point in points if point.fwd_hooks or point._forward_hooks]
