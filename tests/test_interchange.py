"""Exports: stock readers find in them what `sel()` gives, and each chunk is read once."""

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hooked import TinyModel, random_prompts
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file

import actdb
from actdb.cli import main
from actdb.interchange import array, export, record
from actdb.selection.plan import plan_reads

SITES = ["resid_post", "k", "z", "pattern", "embed", "hook_pooled"]
PROMPTS: list[dict[str, Any]] = [
    {**prompt, "flag": i % 3 == 0, "source": None if i % 4 == 1 else f"s{i}"}
    for i, prompt in enumerate(random_prompts(14))
]
SELECTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "all of a row site": ("z", {}),
    "one layer": ("resid_post", {"layer": 1}),
    "kv heads": ("k", {"layer": [1, 0]}),
    "no layers": ("embed", {}),
    "one row": ("z", {"layer": 0, "head": 1, "prompt": 3, "pos": -1}),
    "one neuron": ("resid_post", {"neuron": 2}),
    "some neurons": ("resid_post", {"neuron": [5, 0]}),
    "where": ("z", {"head": 0, "where": "kind = 'a'", "pos": slice(1, None)}),
    "a prompt twice": ("z", {"prompt": [4, 4, 1]}),
    "nothing": ("z", {"where": "kind = 'c'"}),
    "patterns": ("pattern", {"layer": 1}),
    "patterns of some": ("pattern", {"prompt": [9, 2]}),
    "one pattern": ("pattern", {"layer": 0, "head": 1, "prompt": 5}),
    "one query": ("pattern", {"pos": -1}),
    "prompt level": ("hook_pooled", {}),
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[actdb.Run]:
    out = tmp_path_factory.mktemp("interchange") / "x.actdb"
    actdb.harvest(TinyModel(), PROMPTS, out, sites=SITES, part_tokens=30, batch_tokens=24)
    with actdb.open(out) as db:
        yield db.run()


def numbers(run: actdb.Run, site: str, dim: str, given: Any) -> Sequence[int]:
    """Return the selected places of an axis, from the site's plan alone."""
    spec = run.info.site(site)
    assert spec is not None
    if dim not in spec.dims:
        return [-1]
    every = spec.layers if dim == "layer" else range(spec.shape[spec.dims.index(dim)])
    return [int(n) for n in np.atleast_1d(np.asarray(given))] if given is not None else list(every)


def expected_records(run: actdb.Run, site: str, given: Mapping[str, Any]) -> list[tuple[Any, ...]]:
    """Return (layer, head, prompt, pos, activation) of each record, read one by one."""
    selection = run[site].sel(**given)
    if site == "pattern":
        queries = [range(len(run.tokens(p))) if "pos" not in given else [given["pos"]] for p in selection.prompt]
        rows = [
            (p, q % len(run.tokens(p))) for p, qs in zip(selection.prompt.tolist(), queries, strict=True) for q in qs
        ]
    elif site == "hook_pooled":
        rows = [(p, None) for p in selection.prompt.tolist()]
    else:
        rows = list(zip(selection.prompt.tolist(), selection.pos.tolist(), strict=True))
    head = "kv_head" if site == "k" else "head"
    found = []
    places = (numbers(run, site, "layer", given.get("layer")), numbers(run, site, head, given.get("head")))
    for layer, h, (prompt, pos) in product(*places, rows):
        index = {"layer": layer, "head": h, "prompt": prompt, "pos": pos, "neuron": given.get("neuron")}
        values = (
            run[site].sel(**{name: n for name, n in index.items() if n not in (None, -1) or name == "neuron"}).numpy()
        )
        found.append((layer, h, prompt, pos, values[: pos + 1] if site == "pattern" else values))
    return found


def check_records(run: actdb.Run, table: pa.Table, site: str, given: Mapping[str, Any]) -> None:
    """Assert that a table holds exactly the expected records, in float16, with their tokens and labels."""
    wanted = expected_records(run, site, given)
    kind = table.schema.field("activation").type
    assert (kind if given.get("neuron") == 2 else kind.value_type) == pa.float16()
    records = table.to_pylist()
    key = [(r.get("layer", -1), r.get("head", -1), r["prompt_id"], r.get("pos")) for r in records]
    assert sorted(key, key=str) == sorted([w[:4] for w in wanted], key=str)
    values = {w[:4]: w[4] for w in wanted}
    for place, found in zip(key, records, strict=True):
        assert np.array_equal(np.asarray(found["activation"], np.float16), values[place])
        prompt = PROMPTS[found["prompt_id"]]
        for name in ("kind", "i", "flag", "source"):
            assert found[f"label_{name}"] == prompt[name]
        if site != "hook_pooled":
            assert found["token_id"] == prompt["tokens"][found["pos"]]
            assert found["token"] == str(found["token_id"])


@pytest.mark.parametrize("name", SELECTIONS)
def test_parquet_holds_every_record(run: actdb.Run, name: str, tmp_path: Path) -> None:
    site, index = SELECTIONS[name]
    path = run[site].sel(**index).export(tmp_path / "x.parquet")
    table = pq.read_table(path)
    check_records(run, table, site, index)
    about = json.loads(table.schema.metadata[b"actdb"])
    assert (about["run"], about["site"], about["model"]) == (run.name, site, "tiny")


@pytest.mark.parametrize("name", SELECTIONS)
def test_dataset_folder_holds_every_record(run: actdb.Run, name: str, tmp_path: Path) -> None:
    site, index = SELECTIONS[name]
    folder = run[site].sel(**index).export(tmp_path / "x", format="hf")
    with pa.memory_map(str(folder / export.ARROW_FILE)) as file:
        check_records(run, pa.ipc.open_stream(file).read_all(), site, index)


def test_hugging_face_reads_both(run: actdb.Run, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    folder = run["z"].sel(layer=1).export(tmp_path / "z", format="hf")
    file = run["pattern"].sel(layer=0).export(tmp_path / "p.parquet")
    loaded = datasets.load_from_disk(str(folder))
    check_records(run, loaded.data.table, "z", {"layer": 1})
    assert loaded.features["activation"].feature.dtype == "float16"
    read = datasets.load_dataset("parquet", data_files=str(file), cache_dir=str(tmp_path / "cache"))["train"]
    check_records(run, read.data.table, "pattern", {"layer": 0})


def check_arrays(run: actdb.Run, arrays: Mapping[str, npt.NDArray[Any]], site: str, index: Mapping[str, Any]) -> None:
    """Assert that named arrays are what `numpy()` gives, in its order, with prompts, positions and tokens."""
    selection = run[site].sel(**index)
    values = selection.numpy()
    if isinstance(values, list):
        for prompt, square in zip(selection.prompt.tolist(), values, strict=True):
            assert np.array_equal(arrays[f"prompt_{prompt}"], square)
            assert np.array_equal(arrays[f"token_id_{prompt}"], run.tokens(prompt))
    else:
        assert arrays["values"].dtype == values.dtype
        assert np.array_equal(arrays["values"], values)
    if site not in ("pattern", "hook_pooled"):
        assert np.array_equal(arrays["prompt"], selection.prompt)
        assert np.array_equal(arrays["pos"], selection.pos)
        wanted = [PROMPTS[p]["tokens"][q] for p, q in zip(selection.prompt, selection.pos, strict=True)]
        assert arrays["token_id"].tolist() == wanted
    ids = sorted(set(selection.prompt.tolist()))
    assert arrays["prompt_id"].tolist() == ids
    assert arrays["label_i"].tolist() == [PROMPTS[p]["i"] for p in ids]
    assert arrays["label_flag"].tolist() == [PROMPTS[p]["flag"] for p in ids]


@pytest.mark.parametrize("name", SELECTIONS)
def test_npz_is_what_numpy_gives(run: actdb.Run, name: str, tmp_path: Path) -> None:
    site, index = SELECTIONS[name]
    with np.load(run[site].sel(**index).export(tmp_path / "x.npz"), allow_pickle=False) as arrays:
        check_arrays(run, arrays, site, index)
        ids = arrays["prompt_id"].tolist()
        missing = arrays["label_source_missing"] if "label_source_missing" in arrays else [False] * len(ids)
        sources = [None if gone else str(s) for s, gone in zip(arrays["label_source"], missing, strict=True)]
        assert sources == [PROMPTS[p]["source"] for p in ids]
        if "vocabulary" in arrays:
            assert arrays["vocabulary"].tolist() == [str(i) for i in arrays["vocabulary_id"]]
    assert [path.name for path in tmp_path.iterdir()] == ["x.npz"]


@pytest.mark.parametrize("name", SELECTIONS)
def test_safetensors_is_what_numpy_gives(run: actdb.Run, name: str, tmp_path: Path) -> None:
    site, index = SELECTIONS[name]
    path = run[site].sel(**index).export(tmp_path / "x.safetensors")
    arrays = load_file(path)
    check_arrays(run, arrays, site, index)
    with safe_open(path, framework="numpy") as file:
        texts = file.metadata()
    names = [*json.loads(texts["label_source"]), None]  # a code of −1 is the last: the prompt lacks it
    assert [names[code] for code in arrays["label_source"]] == [PROMPTS[p]["source"] for p in arrays["prompt_id"]]
    assert json.loads(texts["actdb"])["site"] == site
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_arrays_of_any_selection(run: actdb.Run, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    site = data.draw(st.sampled_from(["resid_post", "z", "k"]))
    prompts = st.lists(st.integers(0, len(PROMPTS) - 1), min_size=1, max_size=6)
    index: dict[str, Any] = {
        "prompt": data.draw(prompts),
        "pos": data.draw(st.sampled_from([None, 0, -1, slice(-3, None)])),
    }
    index["neuron"] = data.draw(st.sampled_from([None, 1, [3, 0], slice(1, 3)]))
    if site != "resid_post":
        index["head"] = data.draw(st.sampled_from([None, 0, [0]]))
    suffix = data.draw(st.sampled_from([".npz", ".safetensors"]))
    path = run[site].sel(**index).export(tmp_path_factory.mktemp("any") / f"x{suffix}")
    check_arrays(run, np.load(path) if suffix == ".npz" else load_file(path), site, index)


def test_other_layouts(tmp_path: Path) -> None:
    out = tmp_path / "x.actdb"
    both = actdb.harvest(TinyModel(causal=False), PROMPTS, out, run="both", sites=["pattern"], part_tokens=30)
    last = actdb.harvest(TinyModel(), PROMPTS, out, run="last", sites=["pattern", "z"], positions="last")
    top = actdb.harvest(TinyModel(), PROMPTS, out, run="top", sites=["pattern"], pattern="topk:2")
    for record_ in pq.read_table(both["pattern"].sel(layer=0, head=1).export(tmp_path / "b.parquet")).to_pylist():
        square = both["pattern"].sel(layer=0, head=1, prompt=record_["prompt_id"]).numpy()
        assert np.array_equal(np.asarray(record_["activation"], np.float16), square[record_["pos"]])
    records = pq.read_table(last["pattern"].sel(layer=1, head=0).export(tmp_path / "l.parquet")).to_pylist()
    assert [r["pos"] for r in records] == [len(PROMPTS[r["prompt_id"]]["tokens"]) - 1 for r in records]
    for r in records:
        wanted = last["pattern"].sel(layer=1, head=0, prompt=r["prompt_id"]).numpy()[0]
        assert np.array_equal(np.asarray(r["activation"], np.float16), wanted)
    assert np.array_equal(np.load(last["z"].export(tmp_path / "l.npz"))["values"], last["z"].numpy())
    table = pq.read_table(top["pattern_index"].export(tmp_path / "t.parquet"))
    assert table.schema.field("activation").type == pa.list_(pa.uint16(), 2)
    values = load_file(top["pattern_index"].export(tmp_path / "t.safetensors"))["values"]
    assert np.array_equal(values, top["pattern_index"].numpy())


def test_an_export_reads_each_chunk_once_and_holds_little(
    run: actdb.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(record, "BATCH_BYTES", 64)
    monkeypatch.setattr(array, "BATCH_BYTES", 64)
    source = run.source("z").reader
    index = run._prompts
    n_chunks = 4 * len(plan_reads(source.spec, index.row_start, index.n_rows))  # 2 layers × 2 heads
    for name in ("x.parquet", "x.npz", "x.safetensors"):
        before = source.n_reads
        run["z"].export(tmp_path / name)
        assert source.n_reads - before == n_chunks
    file = pq.ParquetFile(tmp_path / "x.parquet")
    sizes = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
    assert max(sizes) <= 64 // 8  # 4 values of 2 bytes a row
    assert np.array_equal(np.load(tmp_path / "x.npz")["values"], run["z"].numpy())


def test_exports_appear_whole_or_not_at_all(run: actdb.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    selection = run["z"].sel(layer=0)
    for format in export.FORMATS:
        target = tmp_path / f"x-{format}"
        selection.export(target, format=format)
        content = {p.name: p.read_bytes() for p in ([*target.iterdir()] if target.is_dir() else [target])}
        with pytest.raises(actdb.SettingError, match=r"exists; give another path, or --overwrite"):
            selection.export(target, format=format)
        with monkeypatch.context() as patch:
            patch.setitem(export.WRITERS, format, _stop_halfway(export.WRITERS[format]))
            with pytest.raises(actdb.SpaceError, match="no space left while writing"):
                selection.export(target, format=format, overwrite=True)
        assert content == {p.name: p.read_bytes() for p in ([*target.iterdir()] if target.is_dir() else [target])}
        run["embed"].export(target, format=format, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(f"x-{format}" for format in export.FORMATS)
    assert np.array_equal(np.load(tmp_path / "x-npz")["values"], run["embed"].numpy())


def _stop_halfway(writer: Any) -> Any:
    def write(selection: actdb.Selection, table: Any, path: Path) -> None:
        writer(selection, table, path)
        raise OSError(28, "No space left on device")

    return write


def test_what_cannot_be_exported(run: actdb.Run, tmp_path: Path) -> None:
    with pytest.raises(actdb.SettingError, match=r"x\.csv: choose a format, one of parquet, npz, safetensors, hf"):
        run["z"].export(tmp_path / "x.csv")
    with pytest.raises(actdb.SettingError, match="format 'csv': choose one of parquet"):
        run["z"].export(tmp_path / "x", format="csv")
    with pytest.raises(actdb.SettingError, match="the name says npz, the format is parquet"):
        run["z"].export(tmp_path / "x.npz", format="parquet")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    with pytest.raises(actdb.SettingError, match="holds other files than an exported dataset's"):
        run["z"].export(tmp_path / "mine", format="hf", overwrite=True)
    with pytest.raises(actdb.SettingError, match="is a folder, and npz is not written as one"):
        run["z"].export(tmp_path / "mine", format="npz", overwrite=True)
    with pytest.raises(actdb.WriteError):
        run["z"].export(tmp_path / "nowhere" / "x.npz")


@pytest.mark.parametrize("format", export.FORMATS)
def test_export_command(run: actdb.Run, tmp_path: Path, capsys: pytest.CaptureFixture[str], format: str) -> None:
    database, path = str(run._folder.root), tmp_path / f"z.{format}"
    given = ["export", database, "z", "-o", str(path), *(["--format", "hf"] if format == "hf" else [])]
    with pytest.raises(SystemExit) as ended:
        main([*given, "--layer", "1", "--head", "0", "--where", "kind = 'b'", "--pos", "-1"])
    assert ended.value.code == 0
    said = capsys.readouterr()
    assert said.out == ""
    assert f"z.{format}: <Selection z [row 7, d_head 4] float16" in said.err
    index = {"layer": 1, "head": 0, "where": "kind = 'b'", "pos": -1}
    if format == "parquet":
        check_records(run, pq.read_table(path), "z", index)
    elif format == "hf":
        datasets = pytest.importorskip("datasets")
        check_records(run, datasets.load_from_disk(str(path)).data.table, "z", index)
    elif format == "npz":
        with np.load(path, allow_pickle=False) as arrays:
            check_arrays(run, arrays, "z", index)
    else:
        check_arrays(run, load_file(path), "z", index)
    with pytest.raises(SystemExit) as ended:
        main(given)
    assert ended.value.code == 1
    assert "exists; give another path, or --overwrite" in capsys.readouterr().err
