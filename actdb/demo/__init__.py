"""The demonstration: a small trained model, its prompts, and the heads that one query finds in it."""

from pathlib import Path

MODEL = Path(__file__).parent / "model"
PROMPTS = Path(__file__).parent / "prompts.jsonl"
