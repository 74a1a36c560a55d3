"""A small model of our own: a GPT-2 of four layers, trained on the study's sentences, one word a token.

It is saved as any Hugging Face folder, so that the study harvests and runs it as it would gpt2-small. A text is one
sentence after another of the same category: what follows a sentence depends on its category, and on nothing else.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from analyses.common.training import train

PROMPTS = Path(__file__).parent / "prompts.jsonl"
"""Six categories of 20 unfinished sentences, 12 words each, lower case and without any mark."""
N_SENTENCES, BATCH = 2, 32
N_WORDS_REPLACED = 0.1
BOS, UNKNOWN = "<bos>", "<unk>"
N_STEPS = {"full": 800, "small": 250}


def make_model(folder: Path, *, size: str, seed: int) -> Path:
    """Train the model and save it with its tokenizer, unless it is there; returns the folder. Takes up to 2 minutes."""
    if (folder / "model.safetensors").exists():
        return folder
    import transformers

    rows = [json.loads(line) for line in PROMPTS.read_text(encoding="utf-8").splitlines()]
    tokenizer = word_tokenizer([row["text"] for row in rows])
    ids: dict[str, list[list[int]]] = {}
    for row in rows:
        ids.setdefault(row["category"], []).append(tokenizer.encode(row["text"], add_special_tokens=False))
    config = transformers.GPT2Config(
        n_layer=4, n_head=4, n_embd=64, vocab_size=len(tokenizer), n_positions=32, bos_token_id=0, eos_token_id=0
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Any = transformers.GPT2LMHeadModel(config)
        sentences = [torch.tensor(found) for found in ids.values()]  # [sentence, word] a category
        train(
            model,
            lambda module, step: _loss(module, draw_batch(sentences, len(tokenizer), seed=seed, step=step)),
            optimizer=torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05),
            n_steps=N_STEPS[size],
            clip=1.0,
            state=folder / "training.pt",
            identity={"seed": seed, "size": size},
            name="own model",
        )
    model.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "training.pt").unlink(missing_ok=True)
    return folder


def word_tokenizer(texts: list[str]) -> Any:
    """Return a tokenizer of whole words, those of the texts, that puts `<bos>` first."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = sorted({word for text in texts for word in text.split()})
    vocabulary = {word: i for i, word in enumerate([BOS, UNKNOWN, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    make: Any = PreTrainedTokenizerFast
    return make(tokenizer_object=tokenizer, bos_token=BOS, unk_token=UNKNOWN)


def draw_batch(sentences: list[torch.Tensor], n_vocabulary: int, *, seed: int, step: int) -> torch.Tensor:
    """Return ids [batch, 1 + words]: BOS and two sentences of a category, some words replaced by any others."""
    generator = np.random.default_rng((seed, step))
    category = generator.integers(0, len(sentences), BATCH)
    chosen = [sentences[c][generator.integers(0, len(sentences[c]), N_SENTENCES)].flatten() for c in category]
    ids = torch.stack(chosen)
    replaced = torch.from_numpy(generator.random(ids.shape) < N_WORDS_REPLACED)
    ids = torch.where(replaced, torch.from_numpy(generator.integers(2, n_vocabulary, ids.shape)), ids)
    return functional.pad(ids, (1, 0), value=0)


def _loss(model: Any, ids: torch.Tensor) -> torch.Tensor:
    logits = model(ids).logits
    return functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
