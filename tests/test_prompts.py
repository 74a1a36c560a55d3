"""Prompts are read from every kind of file, checked and tokenised; what cannot be used is named by its line."""

import datetime
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hooked import TinyModel
from hypothesis import given, settings
from hypothesis import strategies as st

import actdb
from actdb.errors import PromptError
from actdb.harvesting.prompts import read_prompts, tokenise


def write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def stored_prompts(run: actdb.Run, path: Path) -> list[dict[str, Any]]:
    return pq.read_table(path / "runs" / run.name / "prompts.parquet").to_pylist()


# Files.


def test_jsonl(tmp_path: Path) -> None:
    lines = [
        '\ufeff{"text": "Ünïcode “quotes”", "category": "a", "score": 1}',
        "",
        '  {"tokens": [1, 2], "text": "shown", "score": 2.5, "good": true}  ',
        "\t",
        '{"text": " kept ", "category": null, "score": NaN}',
    ]
    for ending in ("\n", "\r\n"):
        prompts = read_prompts(write(tmp_path, "p.jsonl", ending.join(lines)))
        assert prompts.texts == ("Ünïcode “quotes”", "shown", " kept ")
        assert prompts.tokens == (None, (1, 2), None)
        assert prompts.labels == {
            "category": ("a", None, None),
            "score": (1.0, 2.5, None),
            "good": (None, True, None),
        }
        assert [origin.rsplit(", ", 1)[1] for origin in prompts.origins] == ["line 1", "line 3", "line 5"]


def test_txt(tmp_path: Path) -> None:
    prompts = read_prompts(write(tmp_path, "p.txt", "one\n\n  two \r\n   \n{not json\nlast"))
    assert prompts.texts == ("one", "  two ", "{not json", "last")
    assert [origin.rsplit(" ", 1)[1] for origin in prompts.origins] == ["1", "3", "5", "6"]


def test_csv(tmp_path: Path) -> None:
    content = (
        "\ufefftext,n,x,flag,code,word,empty\n"
        '"two\nlines, ""quoted""",1,0.5,true,1_000,a,\n'
        "\n"
        "plain,2,1e3,False,20,,\n"
        "third,,,,,5,\n"
    )
    prompts = read_prompts(write(tmp_path, "p.csv", content))
    assert prompts.texts == ('two\nlines, "quoted"', "plain", "third")
    assert prompts.labels == {
        "n": (1, 2, None),
        "x": (0.5, 1000.0, None),
        "flag": (True, False, None),
        "code": ("1_000", "20", None),
        "word": ("a", None, "5"),
    }
    prompts = read_prompts(write(tmp_path, "t.csv", 'tokens,text\n1 2 3,\n"[4, 5]",shown\n6,\n'))
    assert prompts.tokens == ((1, 2, 3), (4, 5), (6,))
    assert prompts.texts == (None, "shown", None)


def test_parquet(tmp_path: Path) -> None:
    table = {"text": ["a", None], "tokens": [None, [1, 2]], "label": pa.array([1, None], pa.int8()), "none": [None] * 2}
    pq.write_table(pa.table(table), tmp_path / "p.parquet")
    prompts = read_prompts(tmp_path / "p.parquet")
    assert prompts.texts == ("a", None)
    assert prompts.tokens == (None, (1, 2))
    assert prompts.labels == {"label": (1, None)}
    (tmp_path / "k=v").mkdir()
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "k=v" / "p.parquet")
    assert read_prompts(tmp_path / "k=v" / "p.parquet").labels == {}  # a folder's name is no label


def test_iterables_take_numpy_and_torch() -> None:
    items = (
        {"tokens": ids, "number": number, "word": np.str_("x"), "flag": np.bool_(True), "gap": float("nan")}
        for ids, number in ((np.arange(3), np.float32(0.5)), (torch.tensor([4]), np.int64(2)), ((5, 6), None))
    )
    prompts = read_prompts(items)
    assert prompts.tokens == ((0, 1, 2), (4,), (5, 6))
    assert prompts.labels == {"number": (0.5, 2.0, None), "word": ("x",) * 3, "flag": (True,) * 3, "gap": (None,) * 3}
    assert all(type(token) is int for ids in prompts.tokens for token in ids or ())


def test_the_same_prompts_have_the_same_id(tmp_path: Path) -> None:
    rows = [{"text": "a", "n": 1}, {"text": "b", "n": 2}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "p.parquet")
    sources: list[Any] = [
        rows,
        iter(rows),
        write(tmp_path, "p.jsonl", "\n\n".join(map(json.dumps, rows))),
        str(write(tmp_path, "p.csv", "text,n\na,1\nb,2\n")),
        tmp_path / "p.parquet",
    ]
    assert len({read_prompts(source).prompt_set for source in sources}) == 1
    for other in (rows[:1], rows[::-1], [rows[0], {"text": "b", "n": 3}], [{"text": "a"}, {"text": "b"}]):
        assert read_prompts(other).prompt_set != read_prompts(rows).prompt_set


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)
KEYS = st.sampled_from(["text", "tokens", "label", "other"])


@given(st.lists(st.dictionaries(KEYS, JSON, max_size=4), min_size=1, max_size=4))
@settings(max_examples=200)
def test_whatever_json_says_is_taken_or_refused(items: list[dict[str, Any]]) -> None:
    """Nothing but `PromptError` is raised, and what is taken can be hashed and written."""
    try:
        prompts = read_prompts(json.loads(json.dumps(items)))
    except PromptError:
        return
    assert len(prompts) == len(items)
    for values in (prompts.texts, *prompts.labels.values()):
        pa.array(values)
    for ids, text in zip(prompts.tokens, prompts.texts, strict=True):
        assert ids or text


# Bad input: each is one line that names the place.


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.jsonl", '{"text": "a"}\n\n{"text": oops}\n', "line 3: not JSON"),
        ("p.jsonl", '{"text": "a"}\n{"text": "b"', "line 2: not JSON"),
        ("p.jsonl", "[" * 200_000, "line 1: not JSON"),
        ("p.jsonl", '{"tokens": [' + "9" * 5000 + "]}", "line 1: not JSON"),
        ("p.jsonl", '["text"]\n', "line 1: expected an object"),
        ("p.jsonl", '"text"\n', "line 1: expected an object"),
        ("p.jsonl", '\n{"label": 1}\n', 'line 2: no "text" and no "tokens"'),
        ("p.jsonl", '{"text": null}\n', 'line 1: no "text" and no "tokens"'),
        ("p.jsonl", '{"text": 5}\n', 'line 1: "text" is not a string'),
        ("p.jsonl", '{"text": "a"}\n{"text": ""}\n', "line 2: the prompt is empty"),
        ("p.jsonl", '{"tokens": []}\n', "line 1: the prompt is empty"),
        ("p.jsonl", '{"text": "\\ud800"}\n', r"line 1: \"text\" holds '\\ud800'"),
        ("p.jsonl", '{"text": "a", "l": "\\udfff"}\n', "line 1: label 'l' holds"),
        ("p.jsonl", '{"text": "a", "\\udfff": 1}\n', "line 1: label name .* holds"),
        *(
            ("p.jsonl", f'{{"tokens": {ids}}}\n', 'line 1: "tokens" is not a list of whole numbers')
            for ids in ("[1.5]", '["1"]', "[true]", "[null]", '"12"', "3", '{"1": 2}', "[[1]]", "[NaN]", "[Infinity]")
        ),
        ("p.jsonl", '{"text": "a", "x": 1}\n{"text": "b", "x": "s"}\n', "line 2: label 'x' is a string, but a number"),
        ("p.jsonl", '{"text": "a", "x": true}\n{"text": "b", "x": 1}\n', "line 2: label 'x' is a number, but a bool"),
        ("p.jsonl", '{"text": "a", "x": [1]}\n', "line 1: label 'x' is a list"),
        ("p.jsonl", '{"text": "a", "x": {}}\n', "line 1: label 'x' is a dict"),
        ("p.jsonl", '{"text": "a", "x": Infinity}\n', "line 1: label 'x' is not finite"),
        ("p.jsonl", f'{{"text": "a", "x": {2**63}}}\n', "line 1: label 'x' does not fit 64 bits"),
        ("p.jsonl", '{"text": "a", "prompt_id": 1}\n', "line 1: a label may not be called 'prompt_id'"),
        ("p.jsonl", '{"text": "a", "prompt_set": 1}\n', "line 1: a label may not be called 'prompt_set'"),
        ("p.jsonl", "\n \n", "no prompts"),
        ("p.jsonl", "", "no prompts"),
        ("p.jsonl", b"\xff\xfe{\x00", "not UTF-8 text"),
        ("p.txt", "", "no prompts"),
        ("p.txt", b"caf\xe9\n", "not UTF-8 text"),
        ("p.csv", "", "no prompts"),
        ("p.csv", "text,label\n", "no prompts"),
        ("p.csv", "label\nx\n", 'line 2: no "text" and no "tokens"'),
        ("p.csv", "text,label\na,1\n,2\n", 'line 3: no "text" and no "tokens"'),
        ("p.csv", "text,label\na,1\nb,2,3\n", "line 3: more cells than the header"),
        ("p.csv", "text,x,x\na,1,2\n", "line 1: two columns are called 'x'"),
        ("p.csv", 'text\n"a\n', "not CSV"),
        ("p.csv", "tokens\n1 2\n1 x\n", 'line 3: "tokens" is not a list of whole numbers'),
        ("p.csv", "tokens\n1.5\n", 'line 2: "tokens" is not a list of whole numbers'),
        ("p.csv", "text,prompt_id\na,1\n", "line 2: a label may not be called 'prompt_id'"),
        ("p.parquet", b"PAR1 no", "not a Parquet file"),
        ("p.parquet", b"", "not a Parquet file"),
        ("p.docx", "", "prompts are read from .jsonl"),
    ],
)
def test_bad_files(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    path = write(tmp_path, name, content)
    with pytest.raises(PromptError, match=message) as refused:
        actdb.harvest(TinyModel(), path, tmp_path / "x.actdb")
    assert str(path) in str(refused.value)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "x.actdb").exists()


def test_missing_files(tmp_path: Path) -> None:
    (tmp_path / "folder.jsonl").mkdir()
    for name in ("none.jsonl", "none.parquet", "folder.jsonl"):
        with pytest.raises(PromptError, match=f"{name}: no such prompts file"):
            read_prompts(tmp_path / name)
    with pytest.raises(PromptError, match="prompts are read from"):
        read_prompts(tmp_path)


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ([], "the prompts given: no prompts"),
        (["text"], "prompt 0: expected an object"),
        ([{"text": "a"}, {"text": "b", "x": np.array([1, 2])}], "prompt 1: label 'x' is a ndarray"),
        ([{"text": "a", "x": datetime.date(2020, 1, 1)}], "prompt 0: label 'x' is a date"),
        ([{"text": "a", "x": b"b"}], "prompt 0: label 'x' is a bytes"),
        ([{"text": "a", 1: "b"}], "prompt 0: label name 1 is not a string"),
        ([{"tokens": np.array([0.5])}], 'prompt 0: "tokens" is not a list'),
        ([{"tokens": np.array([[1], [2]])}], 'prompt 0: "tokens" is not a list'),
        ([{"tokens": torch.tensor(3)}], 'prompt 0: "tokens" is not a list'),
    ],
)
def test_bad_iterables(items: list[Any], message: str) -> None:
    with pytest.raises(PromptError, match=message):
        read_prompts(items)


# Tokens.


class Characters:
    """A tokenizer of letters a … z with BOS 26, which it can be made to add by itself."""

    bos_token_id: int | None = 26
    adds_bos = False

    def __call__(self, text: str, add_special_tokens: bool = True) -> Any:
        ids = [ord(letter) - ord("a") for letter in text.strip()]
        return SimpleNamespace(input_ids=[26, *ids] if self.adds_bos else ids)

    def __len__(self) -> int:
        return 27

    def convert_ids_to_tokens(self, token: int) -> str:
        return "<s>" if token == 26 else chr(token + ord("a"))

    def decode(self, ids: list[int], **_: Any) -> str:
        return "".join(map(self.convert_ids_to_tokens, ids))


def tokens_of(prompts: list[dict[str, Any]], **options: Any) -> list[list[int]]:
    keep = {"tokenizer": Characters(), "bos": True, "limit": None, "d_vocab": 27, "strict": False, **options}
    found = tokenise(read_prompts(prompts), **keep)
    return [found.prompt(i).tolist() for i in range(len(prompts))]


def test_bos_comes_once_and_given_tokens_are_verbatim() -> None:
    prompts = [{"text": "ab"}, {"tokens": [5]}, {"tokens": [26, 26]}]
    assert tokens_of(prompts) == [[26, 0, 1], [5], [26, 26]]
    assert tokens_of(prompts, bos=False) == [[0, 1], [5], [26, 26]]
    adding = Characters()
    adding.adds_bos = True
    assert tokens_of(prompts, tokenizer=adding)[0] == [26, 0, 1]
    none = Characters()
    none.bos_token_id = None
    assert tokens_of(prompts, tokenizer=none)[0] == [0, 1]


def test_tokenizers_with_a_start_and_an_end_add_both() -> None:
    """As BERT's: no BOS, but [CLS] … [SEP]."""

    class Framing(Characters):
        bos_token_id = None
        cls_token_id = 24

        def __call__(self, text: str, add_special_tokens: bool = True) -> Any:
            ids = super().__call__(text).input_ids
            return SimpleNamespace(input_ids=[24, *ids, 25] if add_special_tokens else ids)

    assert tokens_of([{"text": "ab"}, {"tokens": [1]}], tokenizer=Framing()) == [[24, 0, 1, 25], [1]]
    assert tokens_of([{"text": "ab"}], tokenizer=Framing(), bos=False) == [[0, 1]]


def test_a_text_without_tokens() -> None:
    assert tokens_of([{"text": " "}]) == [[26]]
    with pytest.raises(PromptError, match="prompt 1: the text has no tokens"):
        tokens_of([{"text": "a"}, {"text": " "}], bos=False)


def test_text_needs_a_tokenizer() -> None:
    with pytest.raises(PromptError, match="prompt 1: a text prompt, but .* give --tokenizer or tokens"):
        tokens_of([{"tokens": [1]}, {"text": "a"}], tokenizer=None)
    assert tokens_of([{"tokens": [1], "text": "a"}], tokenizer=None) == [[1]]


@pytest.mark.parametrize("token", [-1, 27, 2**31, 2**40, -(2**70)])
def test_ids_outside_the_vocabulary(token: int) -> None:
    with pytest.raises(PromptError, match=f"prompt 1: token id {token} is outside the vocabulary .0 to 26."):
        tokens_of([{"tokens": [1]}, {"tokens": [0, token]}])
    with pytest.raises(PromptError, match="outside the vocabulary"):
        tokens_of([{"text": "A"}])


def test_long_prompts_are_cut_and_counted(tmp_path: Path) -> None:
    prompts = [{"tokens": [1] * n} for n in (3, 32, 33, 60)]
    out = tmp_path / "x.actdb"
    run = actdb.harvest(TinyModel(n_ctx=32), prompts, out)
    assert [row["truncated"] for row in stored_prompts(run, out)] == [0, 0, 1, 28]
    assert [row["n_tokens"] for row in stored_prompts(run, out)] == [3, 32, 32, 32]
    assert run["z"].sel(prompt=3).shape == (2, 2, 32, 4)
    shorter = actdb.harvest(TinyModel(n_ctx=32), prompts, out, run="shorter", max_length=10)
    assert [row["truncated"] for row in stored_prompts(shorter, out)] == [0, 22, 23, 50]
    longer = actdb.harvest(TinyModel(n_ctx=32), prompts, out, run="longer", max_length=100)
    assert [row["truncated"] for row in stored_prompts(longer, out)] == [0, 0, 1, 28]
    with pytest.raises(PromptError, match="prompt 2: 33 tokens, over the limit of 32 .--strict."):
        actdb.harvest(TinyModel(n_ctx=32), prompts, out, run="strict", strict=True)
    with pytest.raises(PromptError, match="prompt 1: 32 tokens, over the limit of 10"):
        actdb.harvest(TinyModel(n_ctx=32), prompts, out, run="strict", strict=True, max_length=10)
    assert actdb.harvest(TinyModel(n_ctx=32), prompts[:2], out, run="fits", strict=True).status == "complete"
    with actdb.open(out) as db:
        assert [run.name for run in db.runs()].count("strict") == 0


def test_bos_is_never_cut_and_counts(tmp_path: Path) -> None:
    run = actdb.harvest(
        TinyModel(d_vocab=27, n_ctx=4), [{"text": "abcdef"}], tmp_path / "x.actdb", tokenizer=Characters()
    )
    assert run.tokens(0).tolist() == [26, 0, 1, 2]
    assert run.token_texts(0) == ["<s>", "a", "b", "c"]
    assert stored_prompts(run, tmp_path / "x.actdb")[0]["truncated"] == 3


# Labels survive whatever they are called.


def test_labels_that_try_to_be_sql(tmp_path: Path) -> None:
    names = [
        'x"; DROP TABLE prompts; --',
        "select",
        "a b",
        "",
        "Ünï",
        "n_tokens",
        "run",
        "TEXT",
        "Prompt_ID",
        "a.b",
        "'",
        "CASE",
        "case",
        "label\nline",
    ]
    out = tmp_path / "x.actdb"
    run = actdb.harvest(
        TinyModel(), [{"tokens": [1], **{name: i for i, name in enumerate(names)}}, {"tokens": [2]}], out
    )
    labels = stored_prompts(run, out)[0]["labels"]
    assert list(labels.items()) == [(name, i) for i, name in enumerate(names)]
    assert stored_prompts(run, out)[1]["labels"] == dict.fromkeys(names)
    with actdb.open(out) as db:
        row = db.sql("SELECT * FROM prompts WHERE prompt_id = 0").fetchone()
        assert sorted(value for value in row[3:] if isinstance(value, int)) == list(range(len(names)))
        assert db.sql('SELECT "x""; DROP TABLE prompts; --" FROM prompts ORDER BY prompt_id').fetchall() == [
            (0,),
            (None,),
        ]
        assert db.run()["z"].sel(where='"select" = 1').prompt.tolist() == [0]


def test_labels_without_values(tmp_path: Path) -> None:
    out = tmp_path / "x.actdb"
    run = actdb.harvest(TinyModel(), [{"tokens": [1], "a": None, "b": float("nan")}], out)
    assert stored_prompts(run, out)[0]["labels"] == {"a": None, "b": None}
    with actdb.open(out) as db:
        assert db.sql("SELECT a, b FROM prompts").fetchall() == [(None, None)]


def test_labels_keep_their_values(tmp_path: Path) -> None:
    out = tmp_path / "x.actdb"
    prompts = [
        {"tokens": [1], "word": "naïve\n\0 “x”", "flag": False, "n": -(2**62), "x": 0.1},
        {"tokens": [2], "word": "", "flag": True, "n": 2**62, "x": 1e300},
        {"tokens": [3]},
    ]
    run = actdb.harvest(TinyModel(), prompts, out)
    kept = [row["labels"] for row in stored_prompts(run, out)]
    assert kept[:2] == [{name: value for name, value in row.items() if name != "tokens"} for row in prompts[:2]]
    assert kept[2] == dict.fromkeys(("word", "flag", "n", "x"))
