"""Prompts: read from a file or an iterable, checked, given ids, tokenised."""

import csv
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from actdb.errors import PromptError
from actdb.schema import canonical_json

RESERVED = ("prompt_set", "prompt_id")
READABLE = (".jsonl", ".ndjson", ".txt", ".csv", ".parquet")
LABEL_TYPES = {str: "string", bool: "boolean", int: "number", float: "number"}


@dataclass(frozen=True)
class Prompts:
    """Checked prompts: texts or token ids, and label columns with None where a prompt lacks one.

    `origins` say where each came from ("line 7"), for error messages; `prompt_set` is the content hash.
    """

    texts: tuple[str | None, ...]
    tokens: tuple[tuple[int, ...] | None, ...]
    labels: Mapping[str, tuple[Any, ...]]
    origins: tuple[str, ...]
    prompt_set: str

    def __len__(self) -> int:
        return len(self.texts)


@dataclass(frozen=True)
class Tokenised:
    """Token ids of all prompts one after the other: `ids[starts[i] : starts[i + 1]]` are prompt i's."""

    ids: npt.NDArray[np.int32]
    starts: npt.NDArray[np.int64]
    truncated: npt.NDArray[np.int32]

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Tokens of each prompt."""
        return np.diff(self.starts)

    def prompt(self, prompt_id: int) -> npt.NDArray[np.int32]:
        """Return one prompt's ids."""
        return self.ids[self.starts[prompt_id] : self.starts[prompt_id + 1]]


def read_prompts(source: str | os.PathLike[str] | Iterable[Mapping[str, Any]]) -> Prompts:
    """Read and check prompts; raises `PromptError` naming the line for anything that is not usable."""
    if isinstance(source, str | os.PathLike):
        return check_prompts(_read_file(Path(source)), str(source))
    items = ((f"prompt {i}", item) for i, item in enumerate(source))
    return check_prompts(items, "the prompts given")


def check_prompts(items: Iterable[tuple[str, Any]], source: str) -> Prompts:
    """Check (origin, record) pairs and number them."""
    texts: list[str | None] = []
    tokens: list[tuple[int, ...] | None] = []
    origins: list[str] = []
    labels: dict[str, list[Any]] = {}
    kinds: dict[str, tuple[str, str]] = {}
    for origin, item in items:
        where = f"{source}, {origin}"
        text, ids = _content(item, where)
        for name, value in item.items():
            if name not in ("text", "tokens"):
                labels.setdefault(name, [None] * len(texts)).append(_label(name, value, where, kinds))
        texts.append(text)
        tokens.append(ids)
        origins.append(where)
        for column in labels.values():
            if len(column) < len(texts):
                column.append(None)
    if not texts:
        raise PromptError(f"{source}: no prompts")
    columns = {name: tuple(_widen(values)) for name, values in labels.items()}
    content = hashlib.sha256()
    for i, (text, ids) in enumerate(zip(texts, tokens, strict=True)):
        record = {"text": text, "tokens": ids, "labels": {name: values[i] for name, values in columns.items()}}
        content.update(canonical_json(record).encode() + b"\n")
    return Prompts(tuple(texts), tuple(tokens), columns, tuple(origins), content.hexdigest()[:16])


def tokenise(
    prompts: Prompts, *, tokenizer: Any, bos: bool, limit: int | None, d_vocab: int | None, strict: bool
) -> Tokenised:
    """Turn prompts into ids: text through the tokenizer with BOS once, given ids verbatim, cut at `limit` tokens.

    Raises `PromptError` for text without a usable tokenizer, ids outside the vocabulary, and, where `strict`, prompts
    longer than the limit.
    """
    if tokenizer is None and any(ids is None for ids in prompts.tokens):
        origin = prompts.origins[prompts.tokens.index(None)]
        raise PromptError(f"{origin}: a text prompt, but the model has no usable tokenizer; give --tokenizer or tokens")
    encode = encoder(tokenizer, bos=bos)
    pieces: list[npt.NDArray[np.int32]] = []
    truncated = np.zeros(len(prompts), np.int32)
    for i, (text, given) in enumerate(zip(prompts.texts, prompts.tokens, strict=True)):
        ids = given if given is not None else encode(text or "")
        if not ids:
            raise PromptError(f"{prompts.origins[i]}: the text has no tokens")
        if d_vocab is not None and (min(ids) < 0 or max(ids) >= d_vocab):
            bad = next(token for token in ids if not 0 <= token < d_vocab)
            raise PromptError(f"{prompts.origins[i]}: token id {bad} is outside the vocabulary (0 to {d_vocab - 1})")
        if limit is not None and len(ids) > limit:
            if strict:
                raise PromptError(f"{prompts.origins[i]}: {len(ids)} tokens, over the limit of {limit} (--strict)")
            truncated[i] = len(ids) - limit
        pieces.append(np.asarray(ids[:limit], np.int32))
    starts = np.concatenate([[0], np.cumsum([len(piece) for piece in pieces])]).astype(np.int64)
    return Tokenised(np.concatenate(pieces), starts, truncated)


def encoder(tokenizer: Any, *, bos: bool) -> Any:
    """Return a function from text to ids: BOS once where asked; tokenizers with [CLS] … [SEP] add both instead."""

    def encode(text: str) -> Sequence[int]:
        if bos and tokenizer.bos_token_id is None and getattr(tokenizer, "cls_token_id", None) is not None:
            return list(tokenizer(text).input_ids)
        ids = list(tokenizer(text, add_special_tokens=False).input_ids)
        start = tokenizer.bos_token_id
        return [start, *ids] if bos and start is not None and ids[:1] != [start] else ids

    return encode


def has_start(tokenizer: Any) -> bool:
    """Whether a tokenizer defines a token to begin a text with: BOS, or [CLS]."""
    return tokenizer is not None and (
        tokenizer.bos_token_id is not None or getattr(tokenizer, "cls_token_id", None) is not None
    )


def token_texts(ids: npt.NDArray[np.int32], tokenizer: Any) -> dict[int, str]:
    """Return the text of each distinct id: a leading space kept, the id's number where there is no tokenizer."""
    texts: dict[int, str] = {}
    for token in np.unique(ids).tolist():
        if tokenizer is None:
            texts[token] = str(token)
            continue
        piece = tokenizer.convert_ids_to_tokens(token)
        text = tokenizer.decode([token], clean_up_tokenization_spaces=False)
        if piece is not None and piece.startswith("▁") and not text.startswith(" "):
            text = " " + text
        texts[token] = text
    return texts


def _content(item: Any, where: str) -> tuple[str | None, tuple[int, ...] | None]:
    if not isinstance(item, Mapping):
        raise PromptError(f'{where}: expected an object such as {{"text": "..."}}')
    text, ids = item.get("text"), item.get("tokens")
    if text is None and ids is None:
        raise PromptError(f'{where}: no "text" and no "tokens"')
    if text is not None and not isinstance(text, str):
        raise PromptError(f'{where}: "text" is not a string')
    if text is not None:
        _check_unicode(text, f'{where}: "text"')
    if ids is None and not text:
        raise PromptError(f"{where}: the prompt is empty")
    if ids is None:
        return text, None
    try:
        whole = [int(token) for token in ids]
        exact = all(not isinstance(token, bool | str) and token == n for token, n in zip(ids, whole, strict=True))
    except (TypeError, ValueError, OverflowError):
        exact = False
    if not exact:
        raise PromptError(f'{where}: "tokens" is not a list of whole numbers')
    if not whole:
        raise PromptError(f"{where}: the prompt is empty")
    return text, tuple(whole)


def _check_unicode(text: str, what: str) -> None:
    """Refuse lone surrogates, which JSON can spell and UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError as exc:
        raise PromptError(f"{what} holds {text[exc.start]!r}, which is no character") from exc


def _label(name: Any, value: Any, where: str, kinds: dict[str, tuple[str, str]]) -> Any:
    """Check one label value against the column's kind so far."""
    if not isinstance(name, str):
        raise PromptError(f"{where}: label name {name!r} is not a string")
    if name in RESERVED:
        raise PromptError(f"{where}: a label may not be called {name!r}; rename it")
    _check_unicode(name, f"{where}: label name {name!r}")
    if hasattr(value, "item") and not getattr(value, "ndim", 0):
        value = value.item()
    if value is None or (isinstance(value, float) and value != value):
        return None
    kind = LABEL_TYPES.get(type(value))
    if kind is None:
        raise PromptError(f"{where}: label {name!r} is a {type(value).__name__}; use a string, number or boolean")
    if isinstance(value, str):
        _check_unicode(value, f"{where}: label {name!r}")
    if isinstance(value, float) and value in (float("inf"), float("-inf")):
        raise PromptError(f"{where}: label {name!r} is not finite")
    if isinstance(value, int) and abs(value) >= 2**63:
        raise PromptError(f"{where}: label {name!r} does not fit 64 bits")
    seen, first = kinds.setdefault(name, (kind, where))
    if seen != kind:
        raise PromptError(f"{where}: label {name!r} is a {kind}, but a {seen} at {first}; make the column one type")
    return value


def _widen(values: Sequence[Any]) -> Sequence[Any]:
    """Make a column of whole and broken numbers all floats."""
    if any(isinstance(value, float) for value in values):
        return [None if value is None else float(value) for value in values]
    return values


def _read_file(path: Path) -> Iterator[tuple[str, Any]]:
    suffix = path.suffix.lower()
    if suffix not in READABLE:
        raise PromptError(f"{path}: prompts are read from {', '.join(READABLE)} files")
    if not path.is_file():
        raise PromptError(f"{path}: no such prompts file")
    try:
        if suffix == ".parquet":
            yield from _read_parquet(path)
        elif suffix == ".csv":
            yield from _read_csv(path)
        else:
            yield from _read_lines(path, as_json=suffix != ".txt")
    except UnicodeDecodeError as exc:
        raise PromptError(f"{path}: not UTF-8 text ({exc.reason} at byte {exc.start})") from exc
    except PermissionError as exc:
        raise PromptError(f"{path}: cannot be read: permission denied") from exc


def _read_lines(path: Path, *, as_json: bool) -> Iterator[tuple[str, Any]]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            if not as_json:
                yield f"line {number}", {"text": line.rstrip("\r\n")}
                continue
            try:
                yield f"line {number}", json.loads(line)
            except (ValueError, RecursionError) as exc:
                raise PromptError(f"{path}, line {number}: not JSON ({exc})") from exc


def _read_csv(path: Path) -> Iterator[tuple[str, Any]]:
    """Read a CSV; a column is a number or boolean where every value of it reads as one."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        try:
            names = list(reader.fieldnames or ())
            rows = [(reader.line_num, row) for row in reader]
        except csv.Error as exc:
            raise PromptError(f"{path}, line {reader.line_num}: not CSV ({exc})") from exc
    for name in names:
        if names.count(name) > 1:
            raise PromptError(f"{path}, line 1: two columns are called {name!r}")
    columns = {name: _typed([row.get(name) for _, row in rows]) for name in names if name not in ("text", "tokens")}
    for i, (number, row) in enumerate(rows):
        if None in row:
            raise PromptError(f"{path}, line {number}: more cells than the header has columns")
        item = {name: values[i] for name, values in columns.items() if values[i] is not None}
        if row.get("text"):
            item["text"] = row["text"]
        if row.get("tokens"):
            item["tokens"] = _whole_numbers(row["tokens"], f"{path}, line {number}")
        yield f"line {number}", item


def _whole_numbers(text: str, where: str) -> list[int]:
    """Read token ids separated by spaces or commas, in brackets or not."""
    try:
        return [int(word) for word in text.strip("[] ").replace(",", " ").split()]
    except ValueError as exc:
        raise PromptError(f'{where}: "tokens" is not a list of whole numbers') from exc


def _typed(values: list[Any]) -> list[Any]:
    present = [value for value in values if value not in (None, "")]
    grouped = any("_" in value for value in present)  # Python reads 1_000 as a number; nobody else does
    for convert in () if grouped else (int, float):
        try:
            return [None if value in (None, "") else convert(value) for value in values]
        except ValueError:
            continue
    if present and all(value.lower() in ("true", "false") for value in present):
        return [None if value in (None, "") else value.lower() == "true" for value in values]
    return [None if value in (None, "") else value for value in values]


def _read_parquet(path: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path)
    except pa.ArrowException as exc:
        raise PromptError(f"{path}: not a Parquet file ({str(exc).splitlines()[0]})") from exc
    for i, item in enumerate(table.to_pylist()):
        yield f"row {i}", {name: value for name, value in item.items() if value is not None}
