"""Train the demonstration model: a two-layer attention-only transformer on repeated random sequences.

    python -m actdb.demo.train [--out FOLDER] [--steps N] [--seed S]

Predicting the repeat of a random sequence needs a circuit of two heads (Olsson et al. 2022, "In-context
Learning and Induction Heads"): a previous-token head below an induction head. Where the repeats start and how
long their period is differ between sequences, so that attending to a fixed distance does not solve the task.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional
from transformer_lens.config import TransformerBridgeConfig
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.sources.native import boot

from actdb.demo import MODEL
from actdb.harvesting.native import save_model

BOS = 0  # the other tokens, 1 … d_vocab - 1, are drawn uniformly
PERIODS = range(4, 32)
PROMPT_PERIODS = range(8, 32)  # shorter repeats leave it open for most of a prompt whether there is one
MAX_PREFIX = 16  # tokens between BOS and the first copy in training
BATCH = 64
LEARNING_RATE, WARMUP_STEPS, WEIGHT_DECAY = 2e-3, 100, 0.01
REPEATED_PROMPTS, RANDOM_PROMPTS = 64, 32
CONFIG: dict[str, Any] = {
    "n_layers": 2,
    "d_model": 64,
    "n_heads": 4,
    "d_head": 16,
    "n_ctx": 64,
    "d_vocab": 96,
    "attn_only": True,
    "normalization_type": "LN",
}


def draw_batch(generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids [BATCH, n_ctx] (BOS, a prefix, copies of one random block), and which of them can be predicted."""
    n_drawn = CONFIG["n_ctx"] - 1
    tokens = torch.randint(1, CONFIG["d_vocab"], (BATCH, n_drawn), generator=generator)
    period = torch.randint(PERIODS.start, PERIODS.stop, (BATCH, 1), generator=generator)
    prefix = torch.randint(0, MAX_PREFIX + 1, (BATCH, 1), generator=generator)
    offset = torch.arange(n_drawn) - prefix  # [BATCH, n_drawn], negative within the prefix
    source = torch.where(offset < 0, torch.arange(n_drawn), prefix + offset % period)
    ids = functional.pad(tokens.gather(1, source), (1, 0), value=BOS)
    # The first repeated token cannot be known: nothing announces it.
    return ids, functional.pad(offset > period, (1, 0), value=False)


def train(*, steps: int, seed: int) -> TransformerBridge:
    """Train on the next-token loss of all positions; deterministic for a seed, on one thread and machine."""
    bridge = boot(TransformerBridgeConfig(**CONFIG, seed=seed, device="cpu"), model_name="actdb-demo")
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(bridge.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / WARMUP_STEPS, 1 - step / steps)
    )
    for step in range(1, steps + 1):
        ids, predictable = draw_batch(generator)
        logits = bridge.original_model(ids)  # [BATCH, n_ctx, d_vocab]
        losses = functional.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
        optimizer.zero_grad()
        losses.mean().backward()
        optimizer.step()
        schedule.step()
        if step % 250 == 0 or step == steps:
            loss = losses[predictable[:, 1:]].mean().item()
            print(f"step {step}: loss of repeated tokens {loss:.3f} nats", flush=True)
    return bridge.eval().requires_grad_(False)


def make_prompts(seed: int) -> Iterator[dict[str, Any]]:
    """Repeated sequences of many periods and lengths, then random sequences as controls."""
    generator = torch.Generator().manual_seed(seed)

    def draw(n: int) -> list[int]:
        return torch.randint(1, CONFIG["d_vocab"], (n,), generator=generator).tolist()

    lengths = []
    for prompt in range(REPEATED_PROMPTS):
        period = PROMPT_PERIODS[prompt * len(PROMPT_PERIODS) // REPEATED_PROMPTS]
        copies = 2 + (prompt % 2 if 3 * period < CONFIG["n_ctx"] else 0)
        lengths.append(copies * period)
        yield {"tokens": [BOS, *draw(period) * copies], "kind": "repeated", "period": period}
    for prompt in range(RANDOM_PROMPTS):
        length = lengths[prompt * REPEATED_PROMPTS // RANDOM_PROMPTS]
        yield {"tokens": [BOS, *draw(length)], "kind": "random", "period": None}


def measure(bridge: TransformerBridge, prompts: list[dict[str, Any]]) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Mean previous-token and induction mass of every head [layer, head], and loss of the predictable tokens.

    The previous-token mass is what a query gives to the position before it; the induction mass is what a
    query within a repeat gives to the tokens that follow an earlier copy of its own token.
    """
    previous, induction, losses = [], [], []
    for prompt in prompts:
        ids, period = torch.tensor(prompt["tokens"]), prompt["period"]
        logits, cache = bridge.run_with_cache(ids[None])
        pattern = torch.stack([cache[f"blocks.{i}.attn.hook_pattern"][0] for i in range(CONFIG["n_layers"])])
        follows = torch.zeros(len(ids), len(ids), dtype=torch.bool)  # [query, key]
        follows[:, 1:] = (ids[:, None] == ids[None, :-1]).tril(-1)
        previous.append(pattern.diagonal(-1, dim1=2, dim2=3).mean(-1))  # [layer, head]
        induction.append((pattern * follows).sum(-1)[:, :, period + 1 :].mean(-1))  # [layer, head]
        losses.append(functional.cross_entropy(logits[0, period + 1 : -1], ids[period + 2 :], reduction="none"))
    return torch.stack(previous).mean(0), torch.stack(induction).mean(0), torch.cat(losses).mean().item()


def main() -> None:
    """Train, save the model and its prompts, print the scores of every head."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--out", type=Path, default=MODEL.parent, help="folder for model/ and prompts.jsonl")
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    torch.set_num_threads(1)  # the order of sums, hence the weights, would depend on the number of threads
    bridge = train(steps=arguments.steps, seed=arguments.seed)
    prompts = list(make_prompts(arguments.seed))
    save_model(bridge, arguments.out / MODEL.name)
    lines = [json.dumps(prompt) + "\n" for prompt in prompts]
    (arguments.out / "prompts.jsonl").write_text("".join(lines), encoding="utf-8")

    previous, induction, loss = measure(bridge, [prompt for prompt in prompts if prompt["kind"] == "repeated"])
    print("layer  head  previous-token mass  induction mass")
    for layer, head in torch.cartesian_prod(*map(torch.arange, previous.shape)).tolist():
        print(f"{layer:5}  {head:4}  {previous[layer, head]:19.3f}  {induction[layer, head]:14.3f}")
    print(f"loss of repeated tokens: {loss:.3f} nats")


if __name__ == "__main__":
    main()
