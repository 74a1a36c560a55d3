"""The SQL shell, driven through a pipe instead of a terminal."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from prompt_toolkit.completion import CompleteEvent
from prompt_toolkit.document import Document
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput

from actdb import shell
from actdb.catalog import QueryResult, connect, run_query, words
from actdb.errors import SqlError
from actdb.shell import history_path, is_finished, run_shell
from actdb.storage.commits import take_snapshot
from actdb.storage.folder import Folder

END = "\x04"

Session = Callable[[str], tuple[str, str]]


@pytest.fixture
def execute(tmp_path: Path) -> Iterator[Callable[[str], QueryResult]]:
    folder = Folder.create(tmp_path / "db.actdb")
    connection = connect(take_snapshot(folder))
    yield lambda query: run_query(connection, query)
    connection.close()


@pytest.fixture
def session(execute: Callable[[str], QueryResult], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Session:
    def type_in(keys: str) -> tuple[str, str]:
        with create_pipe_input() as pipe:
            pipe.send_text(keys)
            run_shell(execute, ["head_stats"], input=pipe, output=DummyOutput(), history=tmp_path / "state" / "history")
        captured = capsys.readouterr()
        return captured.out, captured.err.partition("\n")[2]

    return type_in


def test_statement(session: Session) -> None:
    assert session("SELECT 1 AS a;\r" + END) == ("a\n-\n1\n", "(1 row)\n")


def test_statement_over_lines(session: Session) -> None:
    assert session("SELECT\r'x;\ry' AS\ra\r;\r" + END)[0] == "a\n-----\nx;\\ny\n"


def test_errors_are_one_line_and_the_shell_goes_on(session: Session) -> None:
    out, err = session("SELEC 1;\rDROP TABLE runs;\rSELECT 1; SELECT 2;\rSELECT 2 AS b;\r" + END)
    assert out == "b\n-\n2\n"
    assert err.splitlines() == [
        'Parser Error: syntax error at or near "SELEC"',
        "actdb sql only reads: DROP refused",
        "actdb sql runs one statement at a time: 2 given",
        "(1 row)",
    ]


def test_empty_lines_do_nothing(session: Session) -> None:
    assert session("\r;\r ; ;\r" + END) == ("", "")


def test_interrupt_drops_the_statement(session: Session) -> None:
    assert session("SELECT 'lost\r\x03SELECT 1 AS a;\r" + END)[0] == "a\n-\n1\n"


def test_interrupted_query_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def execute(query: str) -> QueryResult:
        raise KeyboardInterrupt if "slow" in query else SqlError("answered")

    with create_pipe_input() as pipe:
        pipe.send_text("slow;\rquick;\r" + END)
        run_shell(execute, [], input=pipe, output=DummyOutput(), history=tmp_path / "history")
    assert capsys.readouterr().err.splitlines()[1:] == ["interrupted", "answered"]


@pytest.mark.parametrize("quit", [".quit\r", ".exit\r", END])
def test_quit(session: Session, quit: str) -> None:
    assert session(quit + "SELECT 1;\r") == ("", "")


def test_tables(session: Session) -> None:
    out, _ = session(".tables\r" + END)
    assert {"head_stats", "runs", "tokens"} <= set(out.split())


def test_schema(session: Session) -> None:
    assert "head_stats: one row a run, prompt, layer and head" in session(".schema\r" + END)[0]
    out, _ = session(".schema head_stats;\r" + END)
    assert "entropy" in out
    assert "models:" not in out
    assert out.endswith("direct_logit_attribution  FLOAT\n")
    assert 'no table "nope""' in session('.schema nope";\r' + END)[1]
    assert session(".schema attention\r" + END)[0].startswith("attention(layer BIGINT, head BIGINT")


def test_help_and_unknown_commands(session: Session) -> None:
    assert ".schema [TABLE]" in session(".help\r" + END)[0]
    assert session(".nope\r" + END)[1] == "no command .nope; there are .help, .quit, .schema, .tables\n"


def test_history_is_kept(session: Session, tmp_path: Path) -> None:
    session("SELECT 1 AS kept;\r" + END)
    assert "+SELECT 1 AS kept;" in (tmp_path / "state" / "history").read_text()
    assert session("\x1b[A\r" + END)[0] == "kept\n----\n1\n".replace("1", "   1")  # the up arrow, in a new shell


def test_history_that_cannot_be_written(execute: Callable[[str], QueryResult], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with create_pipe_input() as pipe:
        pipe.send_text("SELECT 1;\r" + END)
        run_shell(execute, [], input=pipe, output=DummyOutput(), history=tmp_path / "file" / "history")
    assert os.listdir(tmp_path).count("history") == 0


def test_history_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert history_path() == tmp_path / "actdb" / "history"
    monkeypatch.delenv("XDG_STATE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert history_path() == tmp_path / ".local" / "state" / "actdb" / "history"


@pytest.mark.parametrize(
    ("text", "finished"),
    [
        ("", True),
        (".tables", True),
        ("SELECT 1", False),
        ("SELECT 1;", True),
        ("SELECT 1; ", True),
        ("SELECT 1; -- done", True),
        ("SELECT 1 -- not;", False),
        ("SELECT ';", False),
        ("SELECT ';'", False),
        ("SELECT 'it''s';", True),
        ('SELECT "a;', False),
        ("SELECT 1 /* ;", False),
        ("SELECT 1 /* ; */;", True),
    ],
)
def test_is_finished(text: str, finished: bool) -> None:
    assert is_finished(text) is finished


def test_completion(tmp_path: Path) -> None:
    folder = Folder.create(tmp_path / "db.actdb")
    connection = connect(take_snapshot(folder))
    completer = shell._completer(words(connection))
    connection.close()

    def complete(text: str) -> set[str]:
        return {c.text for c in completer.get_completions(Document(text), CompleteEvent())}

    assert "head_stats" in complete("FROM head_")
    assert "entropy" in complete("SELECT entr")
    assert "SELECT" in complete("sel")
    assert "list_cosine_similarity" in complete("SELECT list_cos")
    assert complete(".ta") == {".tables"}
    assert "entropy" in complete("SELECT avg(entr")
    assert "entropy" in complete("SELECT h.entr")


def test_tab_completes(session: Session) -> None:
    assert session("SELECT count(*) AS n FROM head_s\t;\r" + END)[0] == "n\n-\n0\n"
