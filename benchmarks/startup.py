"""How long a user waits before anything happens: importing actdb, the command's help, one SQL query as a process."""

import subprocess
import sys
from pathlib import Path

import actdb
from actdb.demo import MODEL, PROMPTS
from benchmarks.harness import Goal, Table, note, take_turns

ROUNDS = {"full": 9, "quick": 5, "tiny": 1}
CLAIMS_S = {"import actdb": 0.3, "actdb --help": 0.4, "actdb sql": 0.8}


def run(size: str, folder: Path) -> Table:
    """Return seconds of each, beside an empty Python process."""
    actdb.harvest(MODEL, PROMPTS, folder / "x.actdb")
    with actdb.open(folder / "x.actdb") as db:
        assert db.sql("SELECT count(*) FROM prompts").fetchone() == (96,)
    main = "from actdb.cli import main; main()"
    commands = {
        "empty Python process": ["-c", ""],
        "import actdb": ["-c", "import actdb"],
        "actdb --help": ["-c", main, "--help"],
        "actdb sql": [
            "-c",
            main,
            "sql",
            str(folder / "x.actdb"),
            "SELECT layer, avg(entropy) FROM head_stats GROUP BY 1",
        ],
    }

    def start(arguments: list[str]) -> None:
        subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    medians = take_turns({name: lambda a=a: start(a) for name, a in commands.items()}, rounds=ROUNDS[size])
    rows = list(medians.items())
    goals = [Goal(name, medians[name], bound, "s", at_least=False) for name, bound in CLAIMS_S.items()]
    return Table("Start-up", note(__doc__), ("what", "s, whole process"), rows, goals)
