"""What a harvest tells its user: the plan before it starts, and a progress bar."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm

from actdb.harvesting.execution import Progress
from actdb.harvesting.harvest import Harvest
from actdb.storage.folder import readable_bytes


def summary(harvest: Harvest, out: Path) -> str:
    """Return the plan as text: run, prompts, parts, bytes of each site before encoding, free disk."""
    info, tokens, parts = harvest.info, harvest.tokens, harvest.info.n_parts
    cut = int((tokens.truncated > 0).sum())
    part_note = "1 part" if parts == 1 else f"{parts:,} parts"
    cut_note = f"; {cut:,} prompts cut to fit the context" if cut else ""
    lines = [
        f"run {info.name}: {info.model['model']}, {info.plan['dtype']} on {info.environment['device']}",
        f"{info.n_prompts:,} prompts, {info.plan['n_tokens']:,} tokens, {info.n_rows:,} rows in {part_note}{cut_note}",
    ]
    for spec in info.sites:
        size = harvest.raw_bytes[spec.name]
        lines.append(
            f"  {spec.name:<16} {readable_bytes(size):>9}  {spec.dtype} [{', '.join(spec.dims)}] {list(spec.shape)}"
        )
    total = sum(harvest.raw_bytes.values())
    free = shutil.disk_usage(_existing(out)).free
    lines.append(
        f"{readable_bytes(total)} before encoding with {harvest.settings.codec}; {readable_bytes(free)} free for {out}"
    )
    return "\n".join(lines)


@contextmanager
def progress_bar() -> Iterator[Callable[[Progress], None]]:
    """Yield a progress callback that draws a bar on stderr: tokens a second, bytes, time left; silent when piped."""
    with tqdm(unit="tok", unit_scale=True, disable=None, dynamic_ncols=True) as bar:

        def update(progress: Progress) -> None:
            bar.total = progress.n_tokens_planned
            bar.set_postfix_str(
                f"{readable_bytes(progress.stored_bytes)}, part {progress.n_parts}/{progress.n_parts_planned}",
                refresh=False,
            )
            bar.update(progress.n_tokens - bar.n)

        yield update


def _existing(path: Path) -> Path:
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path
