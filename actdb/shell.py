"""The SQL shell of `actdb sql`: history, completion, statements over several lines, a few dot commands."""

import contextlib
import os
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from actdb.catalog import SIGNATURES, QueryResult, one_line, quote, schema_text
from actdb.errors import ActdbError, SqlError
from actdb.output import emit

if TYPE_CHECKING:
    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import Completer
    from prompt_toolkit.history import History
    from prompt_toolkit.input import Input
    from prompt_toolkit.key_binding import KeyBindings
    from prompt_toolkit.output import Output

PROMPT = "actdb> "
CONTINUATION = "  ...> "
HELP = """\
A statement ends with ; and may span lines. Only reading: SELECT, FROM, WITH, DESCRIBE, SUMMARIZE, EXPLAIN.
  .tables          the tables
  .schema [TABLE]  columns and what they mean; functions too
  .help            this
  .quit            leave (or Ctrl-D)"""
COMMANDS = (".help", ".quit", ".schema", ".tables")

Execute = Callable[[str], QueryResult]


def run_shell(
    execute: Execute,
    words: Sequence[str],
    *,
    input: "Input | None" = None,
    output: "Output | None" = None,
    history: Path | None = None,
) -> None:
    """Read statements until the end of input and print their rows; an error is one line, and the shell goes on.

    `execute` answers one statement, `words` are completed. `history` defaults to `actdb/history` in the user's state
    folder; where that cannot be written, history lasts as long as the shell.
    """
    session = _session(words, history or history_path(), input=input, output=output)
    print("actdb SQL. End statements with ; and see .help", file=sys.stderr)
    while True:
        try:
            text = session.prompt(PROMPT, prompt_continuation=CONTINUATION)
        except KeyboardInterrupt:
            continue  # drops what was typed
        except EOFError:
            return
        if text.strip() in (".quit", ".exit"):
            return
        _answer(execute, text.strip())


def history_path() -> Path:
    """Return the history file in the user's state folder."""
    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(state) / "actdb" / "history"


def _answer(execute: Execute, text: str) -> None:
    try:
        if text.startswith("."):
            _command(execute, text)
        elif text.strip("; \n\t"):
            _show(execute(text))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
    except ActdbError as exc:
        print(one_line(exc), file=sys.stderr)


def _show(result: QueryResult) -> None:
    emit(result.columns, result.arrow(), "table")


def _command(execute: Execute, text: str) -> None:
    name, _, argument = text.rstrip("; ").partition(" ")
    if name == ".help":
        print(HELP)
    elif name == ".tables":
        _show(execute("SHOW TABLES"))
    elif name == ".schema":
        _schema(execute, argument.strip())
    else:
        raise SqlError(f"no command {name}; there are {', '.join(COMMANDS)}")


def _schema(execute: Execute, table: str) -> None:
    """Print what is documented, and for one table the columns that it has here, labels included."""
    if not table or table in SIGNATURES:
        print(schema_text(table or None))
        return
    result = execute(f"SELECT column_name, column_type FROM (DESCRIBE {quote(table)})")
    with contextlib.suppress(SqlError):  # of a table of the user's own
        print(schema_text(table))
    _show(result)


def _session(
    words: Sequence[str], history: Path, *, input: "Input | None", output: "Output | None"
) -> "PromptSession[str]":
    from prompt_toolkit import PromptSession
    from prompt_toolkit.shortcuts import CompleteStyle

    return PromptSession(
        history=_history(history),
        completer=_completer(words),
        complete_while_typing=False,
        complete_style=CompleteStyle.READLINE_LIKE,
        multiline=True,
        key_bindings=_bindings(),
        input=input,
        output=output,
    )


def _history(path: Path) -> "History":
    from prompt_toolkit.history import FileHistory, InMemoryHistory

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "ab"):
            pass
    except OSError:
        return InMemoryHistory()
    return FileHistory(str(path))


def _bindings() -> "KeyBindings":
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

    bindings = KeyBindings()

    @bindings.add("enter")
    def enter(event: KeyPressEvent) -> None:
        if is_finished(event.current_buffer.text):
            event.current_buffer.validate_and_handle()
        else:
            event.current_buffer.insert_text("\n")

    return bindings


def is_finished(text: str) -> bool:
    """Whether Enter submits a text: empty, a dot command, or one that ends with ; outside quotes and comments."""
    text = text.strip()
    if not text or text.startswith("."):
        return True
    rest = re.sub(r"'(?:[^']|'')*'|\"(?:[^\"]|\"\")*\"|--[^\n]*|/\*.*?\*/", "", text, flags=re.DOTALL)
    return rest.rstrip().endswith(";") and not re.search(r"['\"]|/\*", rest)


def _completer(words: Iterable[str]) -> "Completer":
    from prompt_toolkit.completion import WordCompleter

    backwards = re.compile(r"\w+(?:\.$)?")  # prompt_toolkit searches from the cursor to the left
    return WordCompleter([*sorted(set(words)), *COMMANDS], ignore_case=True, pattern=backwards)
