"""Copy transformers and external ones: sequences, scores against SQL and the model itself, folders of the format."""

import json
import pickle
from collections import Counter
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import actdb
from analyses.common.intervention import logits_of
from analyses.subspace_partition import hand_built
from analyses.subspace_partition.copying import (
    SITES,
    Copier,
    exact_match,
    harvest_pairs,
    harvest_rows,
    score_heads,
    train_copier,
)
from analyses.subspace_partition.external import accuracy_by_length, harvest_external, measure_heads, read_external
from analyses.subspace_partition.sequence import BOS, Task, copy_prompts, draw_patterns, paired_prompts, repeat

TINY = Copier("tiny", Task(n_tokens=6, lengths=(2, 4)), n_steps=12, batch=8, seed=3)
SHARED = Path(__file__).parents[2] / "shared" / "data" / "models" / "unique_copy-2l1h64d"


# sequences


@given(seed=st.integers(0, 10_000), n_tokens=st.integers(4, 12), data=st.data())
@settings(max_examples=40, deadline=None)
def test_patterns_repeat_no_token_or_no_pair(seed: int, n_tokens: int, data: Any) -> None:
    kind = data.draw(st.sampled_from(["token", "bigram"]))
    n_distinct = data.draw(st.integers(4, 8))
    most = n_tokens if kind == "token" else min(n_distinct, n_tokens) ** 2 // 2
    length = data.draw(st.integers(3, most))
    task = Task(n_tokens, (3, most), kind, n_distinct)
    patterns = draw_patterns(task, np.random.default_rng(seed), 5, length)
    assert patterns.shape == (5, length)
    assert 1 <= patterns.min() <= patterns.max() <= n_tokens
    for pattern in patterns.tolist():
        if kind == "token":
            assert len(set(pattern)) == length
        else:
            around = [*pattern, pattern[0]]  # with the pair where the pattern meets its repeat
            assert max(Counter(pairwise(around)).values()) == 1
            assert len(set(pattern)) <= n_distinct


@given(seed=st.integers(0, 1000), kind=st.sampled_from(["token", "bigram"]))
@settings(max_examples=25, deadline=None)
def test_every_known_token_follows_from_those_before(seed: int, kind: str) -> None:
    """What the labels call known is decided by the one earlier place with the same token(s) before it, and no more."""
    task = Task(9, (3, 8), kind, n_distinct=4)
    for prompt in copy_prompts(task, 6, seed=seed):
        tokens, order = prompt["tokens"], task.first_known
        known = range(prompt["known_from"], prompt["known_to"])
        assert known.stop == len(tokens) - 1
        for pos in known:
            context = tokens[pos - order + 1 : pos + 1]
            earlier = [k for k in range(order, pos) if tokens[k - order + 1 : k + 1] == context]
            assert [tokens[k + 1] for k in earlier] == [tokens[pos + 1]]


def test_the_corrupted_partner_differs_everywhere() -> None:
    prompts = paired_prompts(Task(9, (3, 8)), 4, length=6, seed=1)
    assert [prompt["role"] for prompt in prompts] == ["clean"] * 4 + ["corrupted"] * 4
    for clean, corrupted in zip(prompts[:4], prompts[4:], strict=True):
        assert clean["pair"] == corrupted["pair"]
        assert clean["tokens"][0] == corrupted["tokens"][0] == BOS
        assert not any(a == b for a, b in zip(clean["tokens"][1:], corrupted["tokens"][1:], strict=True))
        assert corrupted["tokens"][1:7] == corrupted["tokens"][7:]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lengths": (2, 9)}, "lengths of 2 to 8"),
        ({"lengths": (1, 4)}, "lengths of 2 to 8"),
        ({"lengths": (3, 9), "kind": "bigram", "n_distinct": 4}, "lengths of 3 to 8"),
        ({"lengths": (3, 4), "kind": "pair"}, "choose one of token, bigram"),
    ],
)
def test_patterns_that_cannot_be_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(actdb.SettingError, match=message):
        Task(8, **options)


# training and scores


def test_a_killed_training_ends_with_the_same_model(tmp_path: Path) -> None:
    whole = train_copier(TINY, tmp_path / "a" / "x.actdb", checkpoints=(0, 6), n_prompts=6)
    again = train_copier(TINY, tmp_path / "a" / "x.actdb", checkpoints=(0, 6), n_prompts=6)  # finds all of it done
    assert whole.runs == {step: f"tiny-step{step}" for step in (0, 6, 12)}
    assert whole.run == "tiny-step12"
    np.testing.assert_array_equal(whole.losses, again.losses)
    for one, other in zip(whole.model.state_dict().values(), again.model.state_dict().values(), strict=True):
        assert torch.equal(one, other)
    with actdb.open(tmp_path / "a" / "x.actdb") as db:
        assert {run.name: run.step for run in db.runs()} == {f"tiny-step{step}": step for step in (0, 6, 12)}
    rows = harvest_rows(whole, tmp_path / "a" / "x.actdb", n_prompts=9)
    assert rows["resid_post"].layers == (0, 1)
    assert rows["resid_post"].dtype == np.float32
    assert all(len(set(rows.tokens(i).tolist())) == len(rows.tokens(i)) for i in range(9))  # patterns that stand once
    pairs = harvest_pairs(whole, tmp_path / "a" / "x.actdb", n_pairs=3, length=3)
    assert pairs.n_prompts == 6


def test_the_loss_is_that_of_the_known_tokens() -> None:
    model = TINY.build()
    ids = TINY.batch_at(4)
    length = ids.shape[1] // 2
    logits = model(ids).log_softmax(-1)
    expected = [
        -logits[row, pos, ids[row, pos + 1]] for row in range(len(ids)) for pos in range(length + 1, 2 * length)
    ]
    torch.testing.assert_close(TINY.loss(model, 4), torch.stack(expected).mean())
    assert torch.equal(ids, TINY.batch_at(4))
    assert torch.equal(ids, torch.from_numpy(repeat(ids.numpy()[:, 1 : 1 + length])))


@pytest.fixture(scope="module")
def harvested(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    model = hand_built.build_random(seed=4)
    db = tmp_path_factory.mktemp("copying") / "x.actdb"
    prompts = copy_prompts(hand_built.TASK, 14, seed=2)
    run = actdb.harvest(model, prompts, out=db, run="r", sites=SITES, store="float32", stats=("heads", "tokens"))
    return SimpleNamespace(model=model, db=db, run=run, prompts=prompts)


def test_exact_match_is_what_the_model_predicts(harvested: SimpleNamespace, tmp_path: Path) -> None:
    known = hand_built.build_hand_built()[0]
    for name, model in {"r": harvested.model, "known": known}.items():
        if name == "known":
            actdb.harvest(model, harvested.prompts, out=harvested.db, run=name, sites=("z",), stats=("tokens",))
        right = []
        for prompt in harvested.prompts:
            best = logits_of(model, torch.tensor([prompt["tokens"]]))[0].argmax(-1).tolist()
            places = range(prompt["known_from"], prompt["known_to"])
            right.append(all(best[pos] == prompt["tokens"][pos + 1] for pos in places))
        with actdb.open(harvested.db) as db:
            found = exact_match(db, name)
            short = exact_match(db, name, where="p.pattern_length <= 3")
        assert (found.value, found.n) == (np.mean(right), len(right))
        assert short.n == sum(prompt["pattern_length"] <= 3 for prompt in harvested.prompts)


def test_head_scores_are_those_of_sql(harvested: SimpleNamespace) -> None:
    """The previous-token mass over all queries is `head_stats`'; induction is held to a count by hand."""
    with actdb.open(harvested.db) as db:
        found = score_heads(db, harvested.run)
        rows = db.sql(
            "SELECT layer, head, sum(prev_mass * (n_tokens - 1)) / sum(n_tokens - 1)"
            " FROM head_stats JOIN run_prompts USING (run, prompt_id) WHERE run = 'r' GROUP BY ALL"
        ).fetchall()
    expected = {(layer, head): value for layer, head, value in rows}
    assert {(score.layer, score.head): score.previous for score in found} == pytest.approx(expected, rel=1e-5)
    masses: dict[int, list[float]] = {0: [], 1: []}
    for i, prompt in enumerate(harvested.prompts):
        patterns, tokens = harvested.run["pattern"].sel(prompt=i, head=0).numpy(), prompt["tokens"]
        for query in range(prompt["known_from"], prompt["known_to"]):
            keys = [key for key in range(1, query + 1) if tokens[key - 1] == tokens[query]]
            assert len(keys) == 1
            for layer in masses:
                masses[layer].append(float(patterns[layer, query, keys].sum()))
    assert [score.induction for score in found] == pytest.approx([np.mean(masses[0]), np.mean(masses[1])], rel=1e-5)
    assert [score.name for score in found] == ["L0H0", "L1H0"]


# the decompiled-transformers format


class Bomb:
    """What a hostile pickle does when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return (Path.touch, (self.path,))


@pytest.fixture
def folder(tmp_path: Path, build: Any) -> Path:
    """A folder of the format with a step, an untrained model, and a pickle that must not be loaded."""
    root = tmp_path / "copy-2l4h24d"
    shape = {"vocab_size": 14, "n_positions": 17, "bos_token_id": 10, "eos_token_id": 12, "pad_token_id": 13}
    for seed, place in enumerate((root, root / "step-300")):
        build("gpt2", seed=seed, **shape).save_pretrained(place)
    (root / "training_args.bin").write_bytes(pickle.dumps(Bomb(tmp_path / "exploded")))
    (root / "acc.txt").write_text("2l4h24d\t\t eval_len0-3_acc: 1.0\t\teval_len4-7_acc: 0.9905")
    return root


def test_a_folder_of_the_format_is_harvested_with_its_steps(folder: Path, tmp_path: Path) -> None:
    external = read_external(folder)
    assert (external.n_data, external.longest, external.steps) == (10, 7, (300,))
    assert external.claimed == {(0, 3): 1.0, (4, 7): 0.9905}
    assert [external.text(token) for token in (0, 9, 10, 11, 12, 13)] == ["0", "9", "bos", "sep", "eos", "pad"]
    runs = harvest_external(external, tmp_path / "x.actdb", n_prompts=6, lengths=(2, 4), seed=0)
    assert [(run.name, run.step) for run in runs] == [("copy-2l4h24d-step300", 300), ("copy-2l4h24d", None)]
    for prompt in range(6):
        tokens = runs[-1].tokens(prompt).tolist()
        n = (len(tokens) - 3) // 2
        assert tokens == [10, *tokens[1 : 1 + n], 11, *tokens[1 : 1 + n], 12]
        assert len(set(tokens[1 : 1 + n])) == n
    assert runs[0].info.plan["weights_sha256"] != runs[1].info.plan["weights_sha256"]
    with actdb.open(tmp_path / "x.actdb") as db:
        shares = accuracy_by_length(db, runs[-1].name, [(2, 3), (4, 4)])
    assert [share.n for share in shares] == [4, 2]
    uses = measure_heads(str(folder), runs[-1], tmp_path / "x.actdb")
    assert [use.score.name for use in uses] == [f"L{layer}H{head}" for layer in (0, 1) for head in range(4)]
    assert {use.verdict for use in uses} == {"redundant"}  # an untrained model copies nothing, with or without
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bos_token_id": 0}, "bos, eos, pad .0, 12, 13. of 14"),
        ({"model_type": "llama"}, "'llama'"),
        ({"vocab_size": "many"}, "does not describe"),
        ({"n_positions": None}, "does not describe"),
    ],
)
def test_other_folders_are_refused(folder: Path, change: dict[str, Any], message: str) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(actdb.ModelError, match=message):
        read_external(folder)


def test_lists_that_do_not_fit_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(actdb.SettingError, match="takes 1 to 7"):
        read_external(folder).prompts(3, lengths=(2, 8), seed=0)
    with pytest.raises(actdb.ModelError, match="does not describe"):
        read_external(tmp_path / "nowhere")


@pytest.mark.skipif(not SHARED.is_dir(), reason="the trained folder is not here")
def test_the_trained_folder_copies(tmp_path: Path) -> None:
    external = read_external(SHARED)
    runs = harvest_external(external, tmp_path / "x.actdb", n_prompts=40, lengths=(1, 20), seed=0)
    with actdb.open(tmp_path / "x.actdb") as db:
        shares = [exact_match(db, run.name).value for run in runs]
        heads = score_heads(db, runs[-1])
    assert shares[0] < 0.9
    assert shares[-1] == 1.0
    assert heads[1].induction > 0.4
