"""Paths within a database folder, and what of it a harvest looks through."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hooked import TinyModel, random_prompts

import actdb
from actdb.storage.folder import Folder


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    """A database with files, a link within it, and links that lead outside."""
    root = tmp_path / "x.actdb"
    found = Folder.create(root)
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "file").write_text("secret")
    found.publish("runs/a/run.json", b"{}")
    (root / "runs" / "link").symlink_to("a")
    (root / "runs" / "out").symlink_to(tmp_path / "outside")
    (root / "runs" / "a" / "out.json").symlink_to(tmp_path / "outside" / "file")
    return found


@pytest.mark.parametrize(
    "name", ["", ".", "runs", "runs/a/run.json", "runs//a/", "runs/link/run.json", "runs/a/none", "no/way"]
)
def test_paths_within_are_resolved(folder: Folder, name: str) -> None:
    assert folder.inside(name) == os.path.realpath(folder.root / name)


@pytest.mark.parametrize(
    "name", ["..", "runs/../..", "runs/out", "runs/out/file", "runs/a/out.json", "../outside/file"]
)
def test_paths_that_lead_outside_are_refused(folder: Folder, name: str) -> None:
    with pytest.raises(actdb.DamageError, match="leads outside"):
        folder.inside(name)


@pytest.mark.parametrize("name", ["a\0b", "\ud800"])
def test_names_that_are_no_file_names_are_refused(folder: Folder, name: str) -> None:
    with pytest.raises(actdb.DamageError, match="no file name"):
        folder.inside(name)


def test_a_harvest_looks_through_its_own_folders_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hundreds of runs in one database must not make each further one slower."""
    out = tmp_path / "x.actdb"
    actdb.harvest(TinyModel(seed=1), random_prompts(5), out, run="first")
    walked: list[str] = []
    walk = os.walk

    def recorded(top: str, **options: Any) -> Iterator[Any]:
        for found in walk(top, **options):
            walked.append(os.path.relpath(found[0], out))
            yield found

    monkeypatch.setattr(os, "walk", recorded)
    run = actdb.harvest(TinyModel(seed=2), random_prompts(5), out, run="second")
    own = {"runs/second", "arrays.zarr/second", f"weights/{run.info.plan['weights_sha256']}"}
    assert {path for path in walked if "/".join(path.split("/")[:2]) not in own} == set()
    assert own <= set(walked)


def test_a_harvested_run_is_a_run_of_its_database(tmp_path: Path) -> None:
    """It is opened without the others, and finds the database where a condition needs it."""
    out = tmp_path / "x.actdb"
    actdb.harvest(TinyModel(seed=1), random_prompts(5), out, run="first")
    run = actdb.harvest(TinyModel(seed=2), random_prompts(6), out, run="second")
    with actdb.open(out) as db:
        other = db.run("second")
        assert (run.name, run.status, run.sites, run.n_prompts) == ("second", "complete", other.sites, 6)
        chosen = run["z"].sel(layer=0, head=0, where="kind = 'b'")
        assert (chosen.numpy() == other["z"].sel(layer=0, head=0, where="kind = 'b'").numpy()).all()
    assert chosen.prompt.max() == 5
