"""Run benchmarks and write RESULTS.md; see the package."""

import argparse
import importlib
import tempfile
from pathlib import Path

from benchmarks.harness import SIZES, machine

CLAIMS = ("harvest", "slices", "startup")


def main() -> None:
    """Run the claims named, print their tables and write them all to one file."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("claims", nargs="*", metavar="NAME", help=f"default: all of {', '.join(CLAIMS)}")
    parser.add_argument("--size", choices=SIZES, default="full")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder of RESULTS.md")
    given = parser.parse_args()
    unknown = sorted(set(given.claims) - set(CLAIMS))
    if unknown:
        parser.error(f"unknown benchmark {', '.join(unknown)}; choose from {', '.join(CLAIMS)}")
    texts = [f"# Results\n\nMade by `python -m benchmarks --size {given.size}`. {machine()}\n"]
    for claim in given.claims or CLAIMS:
        with tempfile.TemporaryDirectory(prefix="actdb-bench-") as folder:
            texts.append(importlib.import_module(f"benchmarks.{claim}").run(given.size, Path(folder)).markdown())
        print(texts[-1], flush=True)
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "RESULTS.md").write_text("\n".join(texts), encoding="utf-8")


if __name__ == "__main__":
    main()
