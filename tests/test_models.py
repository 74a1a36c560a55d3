"""Models come from names, folders and modules; what cannot be used is refused in one line, nothing is executed."""

import json
import os
import pickle
import socket
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest
import torch
from hooked import TinyModel, random_prompts
from safetensors.torch import load_file, save_file

import actdb
from actdb.errors import ModelError, PromptError, SettingError, SiteError
from actdb.harvesting.models import load_model, load_tokenizer, weights_sha256
from actdb.harvesting.prompts import read_prompts, tokenise

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
PROMPTS = [{"tokens": [1, 2, 3, 4, 5, 6, 7]}, {"tokens": [9]}, {"tokens": [5, 5, 40, 0]}]
FLAGS = ("fold_ln", "center_writing_weights", "center_unembed")
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="the shared data are not here")


@pytest.fixture
def folder(build: Any, tmp_path: Path) -> Path:
    """A GPT-2 folder of the test's own, to be spoiled."""
    build("gpt2").save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "x.actdb"


def change_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def one_line(error: pytest.ExceptionInfo[Any], *words: str) -> None:
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert word in message


# The hub.


def use_hub(monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + template[template.index("/{repo_id}") :])


@pytest.fixture
def silent_port() -> Any:
    """A port that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@pytest.mark.parametrize("name", ["no-such-model-at-all", "no-such-org/no-such-model", "gpt2-small"])
@pytest.mark.parametrize("hub", ["closed", "silent", "offline"])
def test_unreachable_hub(
    monkeypatch: pytest.MonkeyPatch, silent_port: int, out: Path, name: str, hub: str, capfd: Any
) -> None:
    """Said at once: the hub's own client would go on trying for half a minute, and print each time."""
    use_hub(monkeypatch, f"http://127.0.0.1:{silent_port}" if hub == "silent" else "http://127.0.0.1:1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", hub == "offline")
    monkeypatch.setattr("actdb.harvesting.models.HUB_TIMEOUT_S", 0.3)
    began = time.monotonic()
    with pytest.raises(ModelError) as refused:
        actdb.harvest(name, PROMPTS, out)
    assert time.monotonic() - began < 4
    one_line(refused, name, "the model hub cannot be reached", "local folder", "--random-init SEED")
    assert "Retrying" not in "".join(capfd.readouterr())
    assert not out.exists()
    with pytest.raises(ModelError, match="cannot load tokenizer"):
        load_tokenizer(name)


def test_a_hub_that_has_no_such_model(monkeypatch: pytest.MonkeyPatch, out: Path) -> None:
    class NotFound(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_error(404)

        do_GET = do_HEAD

        def log_message(self, *_: Any) -> None:
            """Say nothing."""

    server = HTTPServer(("127.0.0.1", 0), NotFound)
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        use_hub(monkeypatch, f"http://127.0.0.1:{server.server_port}")
        with pytest.raises(ModelError) as refused:
            actdb.harvest("no-such-model-at-all", PROMPTS, out)
        one_line(refused, "no-such-model-at-all", "the model hub has none to use", "--random-init SEED")
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("name", ["a/b/c", "./model", "/nowhere/model", "~/model", "model.json", "../model"])
def test_names_that_are_paths(out: Path, name: str) -> None:
    with pytest.raises(ModelError, match="no such folder") as refused:
        actdb.harvest(name, PROMPTS, out)
    one_line(refused, name)


# Folders.


def test_a_folder_without_config(folder: Path, out: Path) -> None:
    (folder / "config.json").unlink()
    with pytest.raises(ModelError, match="the folder has no config.json") as refused:
        actdb.harvest(folder, PROMPTS, out)
    one_line(refused, str(folder))
    assert not out.exists()


class Trap:
    """A pickle that makes a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_pickled_weights_are_never_loaded(folder: Path, tmp_path: Path, out: Path) -> None:
    sprung = tmp_path / "sprung"
    (folder / "model.safetensors").unlink()
    for name in ("pytorch_model.bin", "model.safetensors.index.bin", "vocab.pkl", "tokenizer.pkl"):
        (folder / name).write_bytes(pickle.dumps(Trap(sprung)))
    with pytest.raises(ModelError, match="no .safetensors file .pickled weights are never loaded.") as refused:
        actdb.harvest(folder, PROMPTS, out)
    one_line(refused, str(folder))
    torch.save({"weight": Trap(sprung)}, folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match="pickled weights are never loaded"):
        actdb.harvest(folder, PROMPTS, out)
    assert not sprung.exists()
    assert pickle.loads(pickle.dumps(Trap(sprung))) is None  # the trap works
    assert sprung.exists()


def test_code_in_a_folder_is_never_run(folder: Path, tmp_path: Path, out: Path) -> None:
    sprung = tmp_path / "sprung"
    (folder / "evil.py").write_text(f"open({str(sprung)!r}, 'w')\n")
    tokenizer = {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.T", "evil.T"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    change_config(folder, auto_map={"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"})
    assert actdb.harvest(folder, PROMPTS, out).status == "complete"  # GPT-2 is known without it
    with pytest.raises(PromptError, match="no usable tokenizer"):
        actdb.harvest(folder, [{"text": "a"}], out, run="text")
    with pytest.raises(ModelError, match="cannot load tokenizer"):
        load_tokenizer(folder)
    change_config(folder, model_type="evil")
    with pytest.raises(ModelError) as refused:
        actdb.harvest(folder, PROMPTS, out, run="evil")
    one_line(refused, str(folder))
    assert not sprung.exists()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("{", "not a valid JSON file"),
        ("[1]", "cannot be loaded"),
        ("{}", "cannot be loaded"),
        ('{"model_type": 5}', "cannot be loaded"),
        ('{"model_type": "nonsense"}', "nonsense"),
        ('{"model_type": "clip_vision_model"}', "does not support it"),
    ],
)
def test_configurations_of_no_model(folder: Path, out: Path, config: str, message: str) -> None:
    (folder / "config.json").write_text(config)
    for random_init in (None, 0):
        with pytest.raises(ModelError, match=message) as refused:
            actdb.harvest(folder, PROMPTS, out, random_init=random_init)
        one_line(refused, str(folder))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_head": 5}, "divisible"),
        ({"n_layer": 3}, "has no weights for transformer.h.2.attn.c_attn.bias, .* and 9 more"),
        ({"n_embd": 32}, "has weights of other shapes for transformer"),
        ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, "bitsandbytes"),
    ],
)
def test_configurations_that_do_not_fit_the_weights(
    folder: Path, out: Path, changes: dict[str, Any], message: str
) -> None:
    change_config(folder, **changes)
    with pytest.raises(ModelError, match=message) as refused:
        actdb.harvest(folder, PROMPTS, out)
    one_line(refused, str(folder))
    assert not out.exists()


def test_missing_weights_are_never_made_up(folder: Path, out: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["transformer.h.1.mlp.c_fc.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match="has no weights for transformer.h.1.mlp.c_fc.weight"):
        actdb.harvest(folder, PROMPTS, out)


@pytest.mark.parametrize("size", [0, 50, -100])
def test_truncated_weights(folder: Path, out: Path, size: int) -> None:
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:size])
    with pytest.raises(ModelError, match="cannot be loaded: .*header") as refused:
        actdb.harvest(folder, PROMPTS, out)
    one_line(refused, str(folder))


def test_encoder_decoders_are_refused(tmp_path: Path, out: Path) -> None:
    import transformers

    config = transformers.T5Config(vocab_size=48, d_model=16, d_kv=4, d_ff=16, num_layers=2, num_heads=4)
    transformers.T5ForConditionalGeneration(config).save_pretrained(tmp_path / "t5")
    with pytest.raises(ModelError, match="t5 does not run on token ids"):
        actdb.harvest(tmp_path / "t5", PROMPTS, out)
    assert not out.exists()


# Modules.


def test_modules_without_hooks_or_configuration(out: Path, build: Any) -> None:
    unconfigured = TinyModel()
    del unconfigured.cfg
    for module in (build("gpt2"), unconfigured, torch.nn.Linear(2, 2)):
        with pytest.raises(ModelError, match="is no hooked module"):
            actdb.harvest(module, PROMPTS, out)


def test_settings_that_do_not_fit_a_module(out: Path) -> None:
    prompts = random_prompts(3)
    for settings, message in (
        ({"random_init": 0}, "--random-init needs a model name or folder"),
        ({"processing": "folded"}, "TinyModel has no enable_compatibility_mode"),
        ({"processing": "nonsense"}, "choose one of raw, folded"),
        ({"dtype": "bfloat16"}, "the module given computes in float32"),
        ({"dtype": "float8"}, "choose one of float32, float16, bfloat16"),
        ({"device": "nonsense"}, "not available here"),
        ({"layers": [2]}, "layers 0 to 1"),
        ({"layers": []}, "--layers is empty"),
        ({"sites": ""}, "a name is empty"),
        ({"sites": "z,,q"}, "a name is empty"),
        ({"stats": ["nonsense"]}, "choose one of heads"),
    ):
        with pytest.raises(SettingError, match=message):
            actdb.harvest(TinyModel(), prompts, out, **settings)
    assert not out.exists()


@pytest.mark.parametrize(
    ("options", "flags"),
    [
        ({}, [True, True, True]),
        ({"no_processing": True}, [False, False, False]),
        ({"fold_ln": False}, [False, True, True]),
        ({"center_writing_weights": False}, [True, False, True]),
        ({"center_unembed": False}, [True, True, False]),
    ],
)
def test_what_was_done_to_the_weights_is_measured(build: Any, options: dict[str, bool], flags: list[bool]) -> None:
    """A bridge in compatibility mode keeps no record of the options that it was given."""
    from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module

    model = build("gpt2")
    module = build_bridge_from_module(model, "GPT2LMHeadModel", hf_config=model.config, model_name="g")
    assert not any(load_model(module).processing[name] for name in FLAGS)
    module.enable_compatibility_mode(disable_warnings=True, **options)
    processing = load_model(module).processing
    assert [processing[name] for name in FLAGS] == flags
    assert processing["processing"] == ("folded" if any(flags) else "raw")


# Fresh weights.


def test_random_init(folder: Path, model_folder: Any, out: Path) -> None:
    (folder / "model.safetensors").unlink()
    state = torch.get_rng_state()
    first, again, other = (weights_sha256(load_model(folder, random_init=seed)) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert first == again != other
    torch.manual_seed(5)
    assert weights_sha256(load_model(folder, random_init=0)) == first
    run = actdb.harvest(folder, PROMPTS, out, random_init=1, step=7)
    assert run.name == "model-random1-step7"
    assert run.info.plan["random_seed"] == 1
    assert run.info.plan["weights_sha256"] == other
    assert np.isfinite(run["resid_post"].numpy()).all()
    native = [weights_sha256(load_model(model_folder("native-mlp"), random_init=seed)) for seed in (0, 0, 1)]
    assert native[0] == native[1] != native[2]


def test_the_shape_of_gpt2_small_needs_no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    from actdb.harvesting import models

    monkeypatch.setattr(models, "_hub_answers", lambda: pytest.fail("the hub was asked"))
    monkeypatch.setattr(torch.nn.init, "normal_", lambda tensor, *_, **__: tensor)  # the shape alone, quickly
    model = load_model("gpt2-small", random_init=0)
    assert dict(model.config) == {
        "model": "gpt2-small",
        "architecture": "GPT2LMHeadModel",
        "n_layers": 12,
        "n_heads": 12,
        "n_kv_heads": 12,
        "d_model": 768,
        "d_head": 64,
        "d_mlp": 3072,
        "d_vocab": 50257,
        "n_ctx": 1024,
        "norm_eps": 1e-5,
        "normalization": "LN",
    }
    assert model.tokenizer is None


# Sites that a model does not have.


def test_mixture_of_experts(model_folder: Any, out: Path, build: Any) -> None:
    run = actdb.harvest(model_folder("mixtral"), PROMPTS, out)
    assert run.sites == ("resid_post", "z", "pattern")
    from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module

    model = build("mixtral", intermediate_size=24)  # experts as wide as the model: the width tells nothing
    module = build_bridge_from_module(model, "MixtralForCausalLM", hf_config=model.config, model_name="m")
    for site in ("mlp_post", "mlp_pre"):
        with pytest.raises(SiteError, match="mixture of experts.*available: .*mlp_out, q, k"):
            actdb.harvest(module, PROMPTS, out, run="named", sites=[site])
    assert "mlp_post" not in actdb.harvest(module, PROMPTS, out, run="wide")


@pytest.mark.parametrize(
    ("site", "message"),
    [
        ("hook_q_input", "no site 'hook_q_input' .switched off in this model."),
        ("attn.hook_result", "no site 'attn.hook_result' .switched off in this model."),
        ("resid_end", "no site 'resid_end'"),
        ("blocks.5.hook_resid_pre", "no site 'blocks.5.hook_resid_pre'"),
        ("rotary_emb.hook_cos", "of shape .1, 7, 6. for a batch of .2, 7."),
        ("../../escape", "not usable as a name"),
        ("a b", "not usable as a name"),
    ],
)
def test_sites_that_do_not_exist(model_folder: Any, out: Path, site: str, message: str) -> None:
    with pytest.raises(SiteError, match=message) as refused:
        actdb.harvest(model_folder("llama"), PROMPTS, out, sites=["z", site])
    one_line(refused, "available: resid_pre, resid_mid, resid_post", "and any hook suffix")
    assert not out.exists()


# Tokenizers.


@pytest.mark.parametrize("kind", ["gpt2", "llama", "neox", "bert"])
def test_text_needs_tokens_that_someone_made(model_folder: Any, out: Path, kind: str) -> None:
    """For folders without tokenizer files transformers makes one up, of one to five special tokens."""
    with pytest.raises(PromptError, match="prompt 0: a text prompt, but the model has no usable tokenizer"):
        actdb.harvest(model_folder(kind), [{"text": "any words"}], out)
    with pytest.raises(ModelError, match="tokenizer"):
        load_tokenizer(model_folder(kind))
    assert not out.exists()


def test_spoiled_tokenizers_count_as_none(folder: Path, out: Path) -> None:
    for name in ("tokenizer.json", "tokenizer.model"):
        (folder / name).write_text("{")
        assert load_model(folder).tokenizer is None
        with pytest.raises(ModelError, match="tokenizer"):
            load_tokenizer(folder)
        (folder / name).unlink()
    with pytest.raises(ModelError, match="no such folder"):
        load_tokenizer(folder / "a" / "b" / "c")


@needs_data
def test_sentencepiece_is_read_as_it_is() -> None:
    """The loss of a trained model tells whether its text was tokenised as in training."""
    model = load_model(DATA / "models" / "tiny1m")
    text = "Once upon a time, there was a little girl named Lily. She loved to play with her toys."
    options: dict[str, Any] = {"tokenizer": model.tokenizer, "bos": True, "limit": 256, "d_vocab": 512, "strict": True}
    ids = tokenise(read_prompts([{"text": text}]), **options).prompt(0)
    assert ids[0] == 1
    batch = torch.from_numpy(ids.astype(np.int64))[None]
    with torch.inference_mode():
        logits = model.module.original_model(batch).logits[0]
    assert torch.nn.functional.cross_entropy(logits[:-1], batch[0, 1:]) < 0.4


@needs_data
def test_a_real_folder_without_tokenizer(out: Path) -> None:
    folder = DATA / "models" / "unique_copy-2l1h64d"
    with pytest.raises(PromptError, match="no usable tokenizer"):
        actdb.harvest(folder, [{"text": "1 2 3"}], out)
    run = actdb.harvest(folder, [{"tokens": [150, 3, 1, 2, 151]}], out)
    assert run.token_texts(0) == ["150", "3", "1", "2", "151"]
    step = actdb.harvest(folder / "step-1100", [{"tokens": [150, 3, 1, 2, 151]}], out)
    assert step.info.plan["weights_sha256"] != run.info.plan["weights_sha256"]


@needs_data
def test_a_tokenizer_of_ones_own(model_folder: Callable[[str], Path], out: Path) -> None:
    with pytest.raises(PromptError, match="token id .* outside the vocabulary .0 to 47."):
        actdb.harvest(model_folder("gpt2"), [{"text": "Hello"}], out, tokenizer=DATA / "tokenizers" / "gpt2")


# Weights.


@pytest.mark.parametrize("processing", ["raw", "folded"])
@pytest.mark.parametrize("kind", ["gpt2", "llama", "neox"])
def test_weights_reproduce_what_was_stored(model_folder: Any, out: Path, kind: str, processing: str) -> None:
    sites = "embed,resid_pre,q,k,v,z,attn_out,mlp_pre,mlp_post,mlp_out,logits"
    norms = "ln1.hook_out,ln2.hook_out,ln_final.hook_out"
    run = actdb.harvest(
        model_folder(kind), PROMPTS, out, processing=processing, store="float32", sites=f"{sites},{norms}"
    )
    check_weights(run, kind)


def check_weights(run: actdb.Run, kind: str) -> None:
    """Recompute every linear map of the model from what went into it."""
    value = {site: run[site].numpy().astype(np.float64) for site in run.sites}
    ids = np.concatenate([prompt["tokens"] for prompt in PROMPTS])
    pos = np.concatenate([np.arange(len(prompt["tokens"])) for prompt in PROMPTS])

    def weight(name: str, layer: int | None = None) -> Any:
        return run.weight(name, layer=layer).astype(np.float64)

    def same(found: Any, wanted: Any) -> None:
        assert found.shape == wanted.shape
        assert np.abs(found - wanted).max() < 1e-4 * max(1.0, np.abs(wanted).max())

    same(weight("W_E")[ids], value["embed"])
    if kind == "gpt2":
        same(value["embed"] + weight("W_pos")[pos], value["resid_pre"][0])
    same(value["ln_final.hook_out"] @ weight("W_U") + weight("b_U"), value["logits"])
    for layer in range(2):
        for name in "qkv":
            heads = 2 if kind == "llama" and name != "q" else 4
            W, b = weight(f"W_{name.upper()}", layer), weight(f"b_{name.upper()}", layer)  # [head, d_model, d_head]
            assert W.shape == (heads, 24, 6)
            same(np.einsum("rd,hde->hre", value["ln1.hook_out"][layer], W) + b[:, None], value[name][layer])
            assert np.array_equal(run.weight(f"W_{name.upper()}", layer=layer, head=1), W[1].astype(np.float32))
        W_O = weight("W_O", layer)  # [head, d_head, d_model]
        same(np.einsum("hre,hed->rd", value["z"][layer], W_O) + weight("b_O", layer), value["attn_out"][layer])
        gate = "W_gate" if kind == "llama" else "W_in"
        into = value["ln2.hook_out"][layer] @ weight(gate, layer)
        same(into + (0 if kind == "llama" else weight("b_in", layer)), value["mlp_pre"][layer])
        same(value["mlp_post"][layer] @ weight("W_out", layer) + weight("b_out", layer), value["mlp_out"][layer])


def test_weights_are_known_by_their_hash(model_folder: Any, build: Any, tmp_path: Path, out: Path) -> None:
    build("gpt2", seed=1).save_pretrained(tmp_path / "other")
    hashes = {
        name: actdb.harvest(source, PROMPTS, out, run=name, **settings).info.plan["weights_sha256"]
        for name, source, settings in (
            ("first", model_folder("gpt2"), {}),
            ("again", model_folder("gpt2"), {"sites": "none", "layers": [0]}),
            ("other", tmp_path / "other", {}),
            ("half", model_folder("gpt2"), {"dtype": "bfloat16"}),
            ("folded", model_folder("gpt2"), {"processing": "folded"}),
        )
    }
    assert hashes["first"] == hashes["again"]
    assert len(set(hashes.values())) == 4
    assert len(list((out / "weights").iterdir())) == 4  # once a model
    with actdb.open(out) as db:
        with pytest.raises(actdb.SelectionError, match="no weights are stored for layer 1"):
            db.run("again").weight("W_O", layer=1)
        with pytest.raises(actdb.SelectionError, match=r"no weight 'W_Z' there; it has .*attn\.W_O"):
            db.run("first").weight("W_Z", layer=1)
        assert db.run("half").weight("W_O", layer=1).dtype == np.float32


def test_a_changed_model_is_another_plan(folder: Path, build: Any, out: Path) -> None:
    actdb.harvest(folder, PROMPTS, out)
    assert actdb.harvest(folder, PROMPTS, out).status == "complete"  # the same again
    build("gpt2", seed=1).save_pretrained(folder)
    with pytest.raises(actdb.RunError, match="different weights_sha256.*--run"):
        actdb.harvest(folder, PROMPTS, out)
