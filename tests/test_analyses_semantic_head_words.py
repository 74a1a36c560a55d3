"""Words, prompts and what is known beforehand: categories of tokenizers, the text, the judging of gold figures."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import actdb
from analyses.common.report import Claim
from analyses.semantic_head.category import (
    arbitrary_categories,
    categories_of,
    find_categories,
    shuffle_labels,
    token_texts,
)
from analyses.semantic_head.plan import GPT2_HEAD
from analyses.semantic_head.planted import D_VOCAB, planted_categories
from analyses.semantic_head.prompt import read_text, sentences, succession_prompts, topic_text, word_prompts
from analyses.semantic_head.reference import GPT2, NEEDS_WEIGHTS, Reference
from analyses.semantic_head.word import CATEGORIES, SUCCESSIONS

DATA = Path(__file__).parents[2] / "shared" / "data"
GPT2_TOKENIZER, TINY = DATA / "tokenizers" / "gpt2", DATA / "models" / "tiny1m"


class Tokenizer:
    """As much of a tokenizer as is needed: a vocabulary with the space before a word as byte-level BPE writes it."""

    def __init__(self, texts: list[str]) -> None:
        self.vocabulary = {"<bos>": 0, **{text.replace(" ", "Ġ"): i for i, text in enumerate(texts, 1)}}
        self.all_special_ids, self.bos_token_id = [0], 0

    def get_vocab(self) -> dict[str, int]:
        return self.vocabulary


def test_the_lists_hold_no_word_twice() -> None:
    words = [word for held in CATEGORIES.values() for word in held]
    assert len(words) == len(set(words))
    assert len(CATEGORIES) == 8
    assert min(map(len, CATEGORIES.values())) >= 24


@pytest.mark.skipif(not GPT2_TOKENIZER.is_dir(), reason="needs GPT-2's tokenizer")
def test_every_word_is_one_token_of_gpt2() -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(GPT2_TOKENIZER)
    found = find_categories(tokenizer, d_vocab=len(tokenizer), seed=0)
    assert found.kind == "words"
    assert found.bos == tokenizer.bos_token_id
    for words, tokens in zip(CATEGORIES.values(), found.tokens.values(), strict=True):
        assert {len(tokenizer.encode(f" {word}")) for word in words} == {1}
        assert [tokenizer.encode(f" {word}") for word in words[:24]] == [[token] for token in tokens]
        assert [found.text(token) for token in tokens] == list(words[:24])
    assert len(found.successions) == len(SUCCESSIONS)


def test_words_that_are_no_single_token_are_left_out() -> None:
    kept = [f" {word}" for words in CATEGORIES.values() for word in words[::2]]
    found = find_categories(Tokenizer([*kept, "dog"]), d_vocab=500, seed=0)  # dog without its space is another token
    assert {len(tokens) for tokens in found.tokens.values()} == {12}  # as many as the smallest has
    assert [found.text(token) for token in found.tokens["animals"]] == list(CATEGORIES["animals"][:24:2])
    assert found.labels(500)[0] == -1
    with pytest.raises(actdb.SettingError, match="too few single tokens .* 20 words, 4 or more in 1 of 8 categories"):
        find_categories(Tokenizer([f" {word}" for word in CATEGORIES["animals"][:20]]), d_vocab=30, seed=0)


def test_a_small_vocabulary_has_symbols_instead() -> None:
    letters = list("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOP0123456789.,!?:;-")
    words = "he she it they was had said saw to in with up day time mom friend"
    texts = [*letters, *(f" {word}" for word in words.split())]
    found = categories_of({text: i for i, text in enumerate(texts, 1)}, bos=0)
    assert found.kind == "symbols"
    assert {"letters", "digits", "pronouns"} <= set(found.names)
    assert any(len(run) == 10 for run in found.successions)  # the digits


@pytest.mark.skipif(not TINY.is_dir(), reason="needs the tiny trained model")
def test_the_tiny_model_has_symbols() -> None:
    model = actdb.load_model(TINY, processing="folded")
    found = find_categories(model.tokenizer, d_vocab=int(model.cfg.d_vocab), seed=0)
    assert found.kind == "symbols"
    assert token_texts(model.tokenizer)[" she"] in found.tokens["pronouns"]


def test_a_model_without_tokenizer_has_random_groups() -> None:
    found = arbitrary_categories(100, seed=1)
    assert len(found.words) == len(set(found.words)) == 8 * 12
    assert found.words != arbitrary_categories(100, seed=2).words
    with pytest.raises(actdb.SettingError, match="a vocabulary of 20 is too small"):
        arbitrary_categories(20, seed=0)


def test_shuffling_keeps_sizes_and_what_has_no_category() -> None:
    labels = planted_categories().labels(D_VOCAB)
    shuffled = shuffle_labels(labels, np.random.default_rng(0))
    assert np.array_equal(np.bincount(shuffled + 1), np.bincount(labels + 1))
    assert np.array_equal(shuffled < 0, labels < 0)
    assert (shuffled != labels).sum() > 100


def test_prompts_are_of_the_categories() -> None:
    categories = planted_categories()
    labels = categories.labels(D_VOCAB)
    prompts = word_prompts(categories, 20, n_words=100, seed=0)
    tokens = np.array([prompt["tokens"] for prompt in prompts])
    assert tokens.shape == (20, 101)
    assert (tokens[:, 0] == categories.bos).all()
    counts = np.bincount(labels[tokens[:, 1:]].ravel(), minlength=8)
    assert counts.min() > 150  # 250 are expected of each category
    assert word_prompts(categories, 20, n_words=100, seed=0) == prompts
    for prompt in succession_prompts(categories):
        words = np.array(prompt["tokens"][1:])
        assert (np.diff(words) == 1).all()
        assert len(set(labels[words].tolist())) == 1


def test_text_without_tokenizer_stays_with_its_topics() -> None:
    categories = planted_categories()
    labels = categories.labels(D_VOCAB)
    text = list(topic_text(categories, 30, length=64, d_vocab=D_VOCAB, seed=0))
    tokens = np.array([prompt["tokens"] for prompt in text])
    assert tokens.shape == (30, 64)
    word, following = labels[tokens[:, 1:-1]], labels[tokens[:, 2:]]
    assert 0.7 < (following == word)[word >= 0].mean() < 0.9
    assert ((tokens[:, 2:] == tokens[:, 1:-1])[word >= 0]).mean() < 0.05


def test_sentences_have_no_gap_left() -> None:
    texts = [prompt["text"] for prompt in sentences(20, seed=0)]
    assert len(set(texts)) == 20
    assert not any("{" in text or "_Draw" in text for text in texts)


def test_text_of_the_user(tmp_path: Path) -> None:
    lines = [{"text": f"text {i}", "category": "x"} for i in range(50)]
    (tmp_path / "x.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    found = read_text(tmp_path / "x.jsonl", 10, seed=0)
    assert len(found) == 10
    assert all(set(prompt) == {"text", "kind"} for prompt in found)
    few = [prompt["text"] for prompt in read_text(tmp_path / "x.jsonl", 5, seed=0)]
    assert set(few) <= {prompt["text"] for prompt in found}
    with pytest.raises(actdb.PromptError, match="x.csv: give --prompts as .jsonl"):
        read_text(tmp_path / "x.csv", 5, seed=0)
    (tmp_path / "y.jsonl").write_text('{"words": 3}\n')
    with pytest.raises(actdb.PromptError, match="each line needs text or tokens"):
        read_text(tmp_path / "y.jsonl", 5, seed=0)


@pytest.mark.parametrize(
    ("key", "value", "verdict"),
    [
        ("symmetric.rank", 128.0, "agrees with gold"),
        ("symmetric.rank", 127.0, "differs from gold"),
        ("symmetric.norm", 9.2549, "agrees with gold"),
        ("symmetric.norm", 9.26, "differs from gold"),
        ("trace", -7.16, "agrees with gold"),
    ],
)
def test_gold_is_judged_where_the_weights_are(key: str, value: float, verdict: str) -> None:
    entry = Claim(key, value, verdict="below the controls")
    assert Reference(GPT2).judge(entry).verdict == verdict
    beside = Reference(GPT2, is_present=False).judge(entry)
    assert (beside.verdict, beside.gold) == (NEEDS_WEIGHTS, GPT2[key].gold)


def test_claims_are_judged_by_their_interval() -> None:
    known: Any = Reference(GPT2)
    assert known.judge(Claim("ablate.embed", 2.0, 1.9, 2.1)).verdict == "compatible with the claim"
    assert known.judge(Claim("ablate.embed", 1.5, 1.4, 1.6)).verdict == "below the claim"
    assert known.judge(Claim("score", 0.62, 0.6, 0.64)).verdict == "compatible with gold"
    assert known.judge(Claim("score", 0.9, 0.8, 1.0)).verdict == "above gold"
    assert known.judge(Claim("other", 1.0, 0.5, 1.5, null=0.0)).verdict == "above chance"
    assert GPT2_HEAD == (1, 5)
