"""Imports: what `run_with_cache` gave is stored bit for bit from any file and padding, and bad files are refused."""

import json
import os
import pickle
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hooked import Server, files_of
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from transformer_lens import ActivationCache

import actdb
from actdb.cli import main

LENGTHS = (5, 12, 3, 12, 9, 1)
HOOKS = {
    "embed": "hook_embed",
    "resid_pre": "hook_resid_pre",
    "resid_mid": "hook_resid_mid",
    "resid_post": "hook_resid_post",
    "attn_out": "hook_attn_out",
    "mlp_out": "hook_mlp_out",
    "mlp_pre": "mlp.hook_pre",
    "mlp_pre_linear": "mlp.hook_pre_linear",
    "mlp_post": "mlp.hook_post",
    "q": "attn.hook_q",
    "k": "attn.hook_k",
    "v": "attn.hook_v",
    "z": "attn.hook_z",
    "pattern": "attn.hook_pattern",
    "ln_final": "ln_final.hook_normalized",
    "logits": "unembed.hook_out",
}
HEADED = ("q", "k", "v", "z")
Z = "blocks.1.attn.hook_z"
Tensors = Mapping[str, Any]


def prompts(lengths: Sequence[int] = LENGTHS) -> list[dict[str, Any]]:
    generator = np.random.default_rng(1)
    return [{"tokens": generator.integers(3, 48, n).tolist(), "kind": "ab"[i % 2]} for i, n in enumerate(lengths)]


def cached(model: Any, given: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Run a model on right-padded prompts and return every activation by hook name."""
    longest = max(len(prompt["tokens"]) for prompt in given)
    ids = torch.zeros((len(given), longest), dtype=torch.long)
    for row, prompt in zip(ids, given, strict=True):
        row[: len(prompt["tokens"])] = torch.tensor(prompt["tokens"])
    mask = torch.arange(longest) < torch.tensor([[len(prompt["tokens"])] for prompt in given])
    with torch.no_grad():
        _, cache = model.run_with_cache(ids, attention_mask=mask.long())
    return {name: value.contiguous() for name, value in cache.cache_dict.items() if isinstance(value, torch.Tensor)}


@pytest.fixture(scope="module")
def tensors(bridge: Callable[..., Any]) -> Tensors:
    return cached(bridge("llama"), prompts())


@pytest.fixture(scope="module")
def few(tensors: Tensors) -> dict[str, torch.Tensor]:
    """Return some of the tensors: two sites of two layers, and one without layers."""
    wanted = {f"blocks.{layer}.{HOOKS[site]}" for layer in (0, 1) for site in ("z", "pattern")} | {"hook_embed"}
    return {name: tensor for name, tensor in tensors.items() if name in wanted}


def save(tensors: Tensors, path: Path) -> Path:
    if path.suffix == ".safetensors":
        save_file({name: tensor.clone() for name, tensor in tensors.items()}, path)
    elif path.suffix == ".npz":
        write = np.savez_compressed if "packed" in path.name else np.savez
        write(path, **{name: tensor.numpy() for name, tensor in tensors.items()})
    else:
        torch.save(dict(tensors), path, _use_new_zipfile_serialization="old" not in path.name)
    return path


def hook_name(site: str, layer: int | None) -> str:
    return HOOKS[site] if layer is None else f"blocks.{layer}.{HOOKS[site]}"


def check(run: actdb.Run, tensors: Tensors, lengths: Sequence[int] = LENGTHS) -> None:
    """Assert that the run has every site of the file, and that each holds the tensors' values bit for bit."""
    found = {(site, layer) for site in HOOKS for layer in (None, 0, 1) if hook_name(site, layer) in tensors}
    stored = [(spec.name, layer) for spec in run.info.sites for layer in spec.layers or (None,)]
    assert set(stored) == found
    for site, layer in stored:
        values = tensors[hook_name(site, layer)].float().numpy()
        for prompt, n in enumerate(lengths):
            wanted = values[prompt, :, :n, :n] if site == "pattern" else values[prompt, :n]
            wanted = wanted.swapaxes(0, 1) if site in HEADED else wanted
            read = run[site].sel(layer=layer, prompt=prompt).numpy()
            assert np.array_equal(read.astype(np.float32), wanted), (site, layer, prompt)


@pytest.mark.parametrize("name", ["c.pt", "c.pth", "c.safetensors", "c.npz", "packed.npz", "old.pt"])
def test_a_cache_becomes_a_run(tmp_path: Path, tensors: Tensors, name: str) -> None:
    path = save(tensors, tmp_path / name)
    run = actdb.import_activations(path, prompts(), tmp_path / "x.actdb", part_tokens=15)
    assert run.name == path.stem
    assert run.status == "complete"
    assert run.info.n_parts == 4  # of 1 + 3 + 5, 9, 12 and 12 tokens
    assert {"resid_post", "z", "k", "pattern", "mlp_post", "embed", "ln_final"} <= {*run.sites}
    assert {run[site].dtype for site in run.sites} == {np.dtype(np.float32)}
    check(run, tensors)


def test_the_model_is_read_off_the_shapes(tmp_path: Path, tensors: Tensors) -> None:
    path = save(tensors, tmp_path / "c.pt")
    actdb.import_activations(path, prompts(), tmp_path / "x.actdb", run="mine", model="llama-tiny", step=3)
    with actdb.open(tmp_path / "x.actdb") as db:
        assert db.verify() == []
        columns = "model, n_layers, n_heads, n_kv_heads, d_model, d_head, d_mlp, d_vocab, n_ctx, architecture"
        row = db.sql(f"SELECT {columns} FROM models").fetchone()
        assert row == ("llama-tiny", 2, 4, 2, 24, 6, 20, 48, None, None)
        row = db.sql("SELECT run, step, weights_sha256, fold_ln, device, bos, status FROM runs").fetchone()
        assert row == ("mine", 3, None, None, None, False, "complete")
        assert db.sql("SELECT kind, count(*) FROM prompts GROUP BY ALL ORDER BY ALL").fetchall() == [("a", 3), ("b", 3)]
        assert db.sql("SELECT token_id FROM tokens WHERE prompt_id = 4 ORDER BY pos").fetchall() == [
            (token,) for token in prompts()[4]["tokens"]
        ]
        query = "SELECT attention(1, 2, 0, 3)"
        wanted = tensors["blocks.1.attn.hook_pattern"][0, 2, 3, :4].tolist()
        assert db.sql(query).fetchone() == (wanted,)


def padded(tensors: Tensors, n_pos: int, *, left: bool, lengths: Sequence[int] = LENGTHS) -> Tensors:
    """Move every prompt to one end of `n_pos` positions, and fill the pads with NaN: they must never be looked at."""
    moved = {}
    for name, tensor in tensors.items():
        pattern = name.endswith("hook_pattern")
        shape = (*tensor.shape[:2], n_pos, n_pos) if pattern else (len(tensor), n_pos, *tensor.shape[2:])
        moved[name] = tensor.new_full(shape, torch.nan)
        for row, n in enumerate(lengths):
            place = slice(n_pos - n, n_pos) if left else slice(n)
            if pattern:
                moved[name][row, :, place, place] = tensor[row, :, :n, :n]
            else:
                moved[name][row, place] = tensor[row, :n]
    return moved


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("n_pos", [12, 17])
def test_pads_on_either_side(tmp_path: Path, few: Tensors, left: bool, n_pos: int) -> None:
    path = save(padded(few, n_pos, left=left), tmp_path / "c.safetensors")
    options: dict[str, Any] = {"padding": "left" if left else "right", "pad_to": None if n_pos == 12 else n_pos}
    run = actdb.import_activations(path, prompts(), tmp_path / "x.actdb", **options)
    assert run.info.causal
    check(run, few)


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_any_lengths_and_shapes(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    lengths = data.draw(st.lists(st.integers(1, 9), min_size=2, max_size=7))
    batch, longest, generator = len(lengths), max(lengths), torch.Generator().manual_seed(len(lengths))
    dtype = data.draw(st.sampled_from([torch.float16, torch.float32, torch.bfloat16]))
    n_heads, width = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 5))
    shapes = {"blocks.0.attn.hook_z": (n_heads, width), "blocks.1.attn.hook_z": (n_heads, width), "hook_embed": (7,)}
    tensors = {name: torch.randn(batch, longest, *s, generator=generator).to(dtype) for name, s in shapes.items()}
    pattern = torch.rand(batch, n_heads, longest, longest, generator=generator).to(dtype)
    causal = data.draw(st.booleans())
    tensors["blocks.1.attn.hook_pattern"] = pattern.tril() if causal else pattern
    left, n_pos = data.draw(st.booleans()), longest + data.draw(st.integers(0, 3))
    folder = tmp_path_factory.mktemp("any")
    path = save(
        padded(tensors, n_pos, left=left, lengths=lengths),
        folder / data.draw(st.sampled_from(["c.pt", "c.safetensors"])),
    )
    options: dict[str, Any] = {"pad_to": n_pos, "part_tokens": data.draw(st.sampled_from([None, 1, 12]))}
    options |= {"padding": "left" if left else "right", "codec": data.draw(st.sampled_from(["lz4", "raw"]))}
    run = actdb.import_activations(path, prompts(lengths), folder / "x.actdb", **options)
    assert run.info.causal == (causal or longest == 1)
    check(run, tensors, lengths)


def test_one_prompt_without_a_batch_axis(tmp_path: Path, bridge: Callable[..., Any]) -> None:
    given = prompts((7,))
    tensors = {name: t for name, t in cached(bridge("llama"), given).items() if not name.startswith("rotary")}
    without = {name: tensor[0].clone() for name, tensor in tensors.items() if len(tensor) == 1}
    run = actdb.import_activations(save(without, tmp_path / "c.pt"), given, tmp_path / "x.actdb")
    check(run, {name: tensor for name, tensor in tensors.items() if len(tensor) == 1}, (7,))


def test_patterns_that_look_ahead(tmp_path: Path, bridge: Callable[..., Any]) -> None:
    tensors = cached(bridge("bert"), prompts())
    path = save(tensors, tmp_path / "c.pt")
    run = actdb.import_activations(path, prompts(), tmp_path / "x.actdb", part_tokens=15)
    assert not run.info.causal
    check(run, tensors)
    with pytest.raises(actdb.SettingError, match="--causal: the patterns of the file look ahead"):
        actdb.import_activations(path, prompts(), tmp_path / "y.actdb", causal=True)
    z = save({Z: tensors[Z]}, tmp_path / "z.pt")  # without patterns nothing tells
    assert actdb.import_activations(z, prompts(), tmp_path / "z.actdb").info.causal
    assert not actdb.import_activations(z, prompts(), tmp_path / "y.actdb", causal=False).info.causal


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_half_precision_is_kept_exactly(tmp_path: Path, few: Tensors, suffix: str) -> None:
    brain = {name: tensor.bfloat16() for name, tensor in few.items()}
    run = actdb.import_activations(save(brain, tmp_path / f"b{suffix}"), prompts(), tmp_path / "x.actdb")
    assert (run["z"].dtype, run.info.plan["dtype"]) == (np.float32, "bfloat16")
    check(run, brain)
    half = {name: tensor.half() for name, tensor in few.items()}
    run = actdb.import_activations(save(half, tmp_path / f"h{suffix}"), prompts(), tmp_path / "x.actdb")
    assert (run["z"].dtype, run.info.plan["dtype"]) == (np.float16, "float16")
    check(run, half)
    mixed = {**half, Z: few[Z]}
    check(actdb.import_activations(save(mixed, tmp_path / f"m{suffix}"), prompts(), tmp_path / "x.actdb"), mixed)


def test_rounding_only_when_asked(tmp_path: Path, few: Tensors) -> None:
    path = save(few, tmp_path / "c.pt")
    run = actdb.import_activations(path, prompts(), tmp_path / "x.actdb", store="float16", codec="raw")
    check(run, {name: tensor.half() for name, tensor in few.items()})
    double = save({name: tensor.double() for name, tensor in few.items()}, tmp_path / "d.npz")
    with pytest.raises(actdb.SettingError, match=r"holds torch\.float64; say --store float32 \(or float16\)"):
        actdb.import_activations(double, prompts(), tmp_path / "x.actdb")
    check(actdb.import_activations(double, prompts(), tmp_path / "x.actdb", store="float32"), few)


def test_choice_of_sites_and_layers(tmp_path: Path, tensors: Tensors) -> None:
    extra = {
        **tensors,
        "blocks.1.hook_probe": torch.randn(6, 12, 5),
        "hook_pooled": torch.randn(6, 4),
        "blocks.0.attn.hook_rot": torch.randn(6, 12, 2, 6),
        "blocks.0.attn.hook_attn_scores": torch.rand(6, 4, 12, 12),
    }
    path = save(extra, tmp_path / "c.safetensors")
    names = ["hook_probe", "hook_pooled", "attn.hook_rot", "attn.hook_attn_scores", "z"]
    run = actdb.import_activations(path, prompts(), tmp_path / "x.actdb", sites=names)
    assert run.sites == tuple(names)
    assert np.array_equal(run["hook_probe"].sel(layer=1, prompt=2).numpy(), extra["blocks.1.hook_probe"][2, :3])
    assert np.array_equal(run["hook_pooled"].numpy(), extra["hook_pooled"])
    rotated = run["attn.hook_rot"].sel(layer=0, prompt=4)
    assert rotated.dims == ("kv_head", "row", "feature")
    assert np.array_equal(rotated.numpy(), extra["blocks.0.attn.hook_rot"][4, :9].swapaxes(0, 1))
    one = actdb.import_activations(path, prompts(), tmp_path / "x.actdb", run="one", sites="z,k", layers=[1])
    assert one.sites == ("z", "k")
    check(one, {name: tensors[name] for name in (Z, "blocks.1.attn.hook_k")})
    with pytest.raises(actdb.SiteError, match="the file holds no site 'mlp.hook_nope'; its tensors: "):
        actdb.import_activations(path, prompts(), tmp_path / "x.actdb", run="two", sites=["z", "mlp.hook_nope"])
    with pytest.raises(actdb.SiteError, match="no site 'z'"):
        actdb.import_activations(path, prompts(), tmp_path / "x.actdb", run="two", sites=["z"], layers=[2])
    other = save({"a": torch.ones(6, 12, 5), "b": torch.ones(3)}, tmp_path / "o.pt")
    with pytest.raises(actdb.SiteError, match="no tensor of a known site; its tensors: a, b$"):
        actdb.import_activations(other, prompts(), tmp_path / "x.actdb", run="two")


BROKEN: dict[str, tuple[str, tuple[int, ...], str]] = {
    "too few prompts": ("hook_embed", (5, 12, 24), r"hook_embed is \[5, 12, 24\]: 5 prompts, but there are 6 prompts"),
    "other positions": (Z, (6, 13, 4, 6), r"hook_z is \[6, 13, 4, 6\], but blocks\.0\.attn\.hook_z is \[6, 12, 4, 6\]"),
    "no heads": (Z, (6, 12, 24), r"hook_z is \[6, 12, 24\], but blocks\.0"),
    "pads kept": ("hook_embed", (6, 13, 24), r"hook_embed is .*12 positions: .*or --pad-to\. Is a BOS missing"),
    "a flat embedding": ("hook_embed", (6, 24), r"hook_embed is \[6, 24\], not \[batch, pos, feature\]"),
    "nothing": ("hook_embed", (6, 12, 0), r"hook_embed is \[6, 12, 0\], not \[batch, pos, feature\]"),
    "other heads": ("blocks.0.attn.hook_q", (6, 12, 3, 6), r"hook_z has head 4, but blocks\.0\.attn\.hook_q has 3"),
    "other widths": ("blocks.0.hook_resid_post", (6, 12, 25), r"hook_embed has d_model 24, but .*resid_post has 25"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_shapes_that_do_not_fit_name_their_tensor(tmp_path: Path, few: Tensors, case: str) -> None:
    name, shape, message = BROKEN[case]
    path = save({**few, name: torch.rand(shape)}, tmp_path / "c.pt")
    with pytest.raises(actdb.ActivationsError, match=message):
        actdb.import_activations(path, prompts(), tmp_path / "x.actdb")
    assert not (tmp_path / "x.actdb").exists()


def test_numbers_that_are_no_activations(tmp_path: Path, few: Tensors) -> None:
    path = save({**few, Z: torch.ones(6, 12, 4, 6, dtype=torch.long)}, tmp_path / "c.npz")
    with pytest.raises(actdb.ActivationsError, match=r"blocks\.1\.attn\.hook_z holds torch\.int64, not floating-point"):
        actdb.import_activations(path, prompts(), tmp_path / "x.actdb")
    for bad in (torch.nan, torch.inf, -torch.inf):
        wrong = few[Z].clone()
        wrong[4, 8, 1, 2] = bad
        path = save({**few, Z: wrong}, tmp_path / "c.pt")
        with pytest.raises(actdb.OverflowingError, match=r"blocks\.1\.attn\.hook_z is not finite .* in prompt 4"):
            actdb.import_activations(path, prompts(), tmp_path / "x.actdb")
    path = save({**few, Z: few[Z] * 1e6}, tmp_path / "c.pt")
    with pytest.raises(actdb.OverflowingError, match="z of layer 1 reaches .* beyond what float16 holds; use --store"):
        actdb.import_activations(path, prompts(), tmp_path / "x.actdb", store="float16")
    assert not (tmp_path / "x.actdb").exists()


class Bomb:
    """An object whose unpickling makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.path),))


@pytest.mark.parametrize("name", ["c.pt", "old.pt", "plain.pt", "c.npz"])
def test_pickled_objects_are_refused_and_never_run(tmp_path: Path, few: Tensors, name: str) -> None:
    path, harm = tmp_path / name, tmp_path / "harm"
    if name == "plain.pt":
        path.write_bytes(pickle.dumps(Bomb(harm)))
    elif path.suffix == ".pt":
        save({**few, "bomb": Bomb(harm)}, path)
    else:
        np.savez(path, z=np.array([Bomb(harm)], object))
    with pytest.raises(actdb.ActivationsError, match=r"holds pickled objects.*refused: unpickling runs code"):
        actdb.import_activations(path, prompts(), tmp_path / "x.actdb")
    assert not harm.exists()


def test_a_whole_cache_object_is_refused(tmp_path: Path, few: Tensors, bridge: Callable[..., Any]) -> None:
    cache = ActivationCache(dict(few), bridge("llama"))
    cache.model = None  # the model itself need not be picklable
    torch.save(cache, tmp_path / "c.pt")
    message = r"pickled objects \(transformer_lens\..*ActivationCache\).*Save the tensors alone: torch\.save\("
    with pytest.raises(actdb.ActivationsError, match=message):
        actdb.import_activations(tmp_path / "c.pt", prompts(), tmp_path / "x.actdb")


def _files_that_cannot_be_read(folder: Path, few: Tensors) -> Iterator[tuple[Path, str]]:
    yield folder / "none.pt", "no such file of activations"
    (folder / "x.csv").write_text("1,2")
    yield folder / "x.csv", r"activations are read from \.pt, \.pth, \.safetensors, \.npz files"
    torch.save(list(few.values()), folder / "list.pt")
    yield folder / "list.pt", "holds a list, not tensors by hook name; save cache.cache_dict"
    torch.save({"hook_embed": few["hook_embed"], "model": "gpt2"}, folder / "text.pt")
    yield folder / "text.pt", "'model' is a str, not a tensor; save tensors alone"
    (folder / "words.pt").write_text("hello world, some text")
    yield folder / "words.pt", "is no file of torch.save, or it is damaged"
    (folder / "nothing.pt").touch()
    yield folder / "nothing.pt", "is no file of torch.save, or it is damaged"
    yield save({}, folder / "empty.safetensors"), "holds no tensors"
    for suffix, kind in ((".pt", "file of torch.save"), (".safetensors", "safetensors file"), (".npz", "npz file")):
        (folder / f"garbage{suffix}").write_bytes(b"\x07garbage" * 9)
        yield folder / f"garbage{suffix}", f"is no {kind}"
        whole = save(few, folder / f"cut{suffix}")
        whole.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
        yield whole, f"is no {kind}"


def test_files_that_cannot_be_read(tmp_path: Path, few: Tensors) -> None:
    for path, message in _files_that_cannot_be_read(tmp_path, few):
        with pytest.raises(actdb.ActivationsError, match=message) as caught:
            actdb.import_activations(path, prompts(), tmp_path / "x.actdb")
        assert str(path) in str(caught.value)
    path = save(few, tmp_path / "c.pt")
    with pytest.raises(actdb.SettingError, match="--padding middle: choose one of right, left"):
        actdb.import_activations(path, prompts(), tmp_path / "x.actdb", padding="middle")
    with pytest.raises(actdb.SettingError, match="--pad-to 11: the longest prompt has 12 tokens"):
        actdb.import_activations(path, prompts(), tmp_path / "x.actdb", pad_to=11)
    with pytest.raises(actdb.SettingError, match="--part-tokens 0: must be at least 1"):
        actdb.import_activations(path, prompts(), tmp_path / "x.actdb", part_tokens=0)
    assert not (tmp_path / "x.actdb").exists()


def write_prompts(path: Path) -> str:
    path.write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts()))
    return str(path)


def test_killed_imports_go_on(tmp_path: Path, few: Tensors) -> None:
    server, whole = Server(), tmp_path / "whole.actdb"
    path = str(save(few, tmp_path / "c.pt"))
    order: dict[str, Any] = {"path": path, "prompts": write_prompts(tmp_path / "p.jsonl"), "part_tokens": 15}
    actdb.import_activations(out=whole, **order)
    n_killed = 0
    for kill_at in range(3, 400, 17):
        out = tmp_path / f"{kill_at}.actdb"
        status = server.wait(server.start(out, kill_at=kill_at, **order))
        n_killed += status == -signal.SIGKILL
        if (out / "actdb.json").exists():
            with actdb.open(out) as db:
                assert db.verify() == []
        run = actdb.import_activations(out=out, **order)
        assert run.status == "complete"
        assert files_of(out) == files_of(whole)
        if status == 0:
            break
    assert server.close() == 0
    assert status == 0
    assert n_killed > 5


def test_damaged_parts_are_imported_again(tmp_path: Path, few: Tensors) -> None:
    path, out = save(few, tmp_path / "c.pt"), tmp_path / "x.actdb"
    actdb.import_activations(path, prompts(), out, part_tokens=15)
    sound = files_of(out)
    shard = next(out / name for name in sound if name.startswith("arrays.zarr") and "/z/c/" in name)
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    with actdb.open(out) as db:
        assert len(db.verify()) == 1
    actdb.import_activations(path, prompts(), out, part_tokens=15)
    assert files_of(out) == sound
    save({**few, Z: few[Z] + 1}, path)
    with pytest.raises(actdb.RunError, match=r"imported_sha256"):
        actdb.import_activations(path, prompts(), out, part_tokens=15)


def test_import_command(tmp_path: Path, few: Tensors, capsys: pytest.CaptureFixture[str]) -> None:
    path, given = str(save(few, tmp_path / "c.pt")), write_prompts(tmp_path / "p.jsonl")
    options = ["--run", "mine", "--layers", "1", "--part-tokens", "15"]
    with pytest.raises(SystemExit) as ended:
        main(["import", path, given, "-o", str(tmp_path / "x.actdb"), *options])
    assert ended.value.code == 0
    said = capsys.readouterr()
    assert said.out == ""
    assert "x.actdb: run mine complete, 6 prompts, sites z, pattern, embed" in said.err
    with actdb.open(tmp_path / "x.actdb") as db:
        assert db.run("mine").info.n_parts == 4
        check(db.run("mine"), {name: tensor for name, tensor in few.items() if "blocks.0" not in name})
    torch.save(ActivationCache({}, None), path)
    with pytest.raises(SystemExit) as ended:
        main(["import", path, given, "-o", str(tmp_path / "x.actdb")])
    assert ended.value.code == 1
    assert len(capsys.readouterr().err.splitlines()) == 2  # "loading ..." and the refusal, no traceback
