"""actdb: an activation database for mechanistic interpretability.

`harvest` runs a model once and stores its activations; `open` reads them back: SQL over statistics, lazy slices of
arrays. Importing this package imports neither torch nor zarr nor duckdb; each is imported when it is first needed.
"""

from typing import TYPE_CHECKING

from actdb.catalog import QueryResult
from actdb.database import Database, open
from actdb.errors import (
    ActdbError,
    ActivationsError,
    DamageError,
    DatabaseError,
    ModelError,
    OverflowingError,
    PromptError,
    RunError,
    SelectionError,
    SettingError,
    SiteError,
    SpaceError,
    SqlError,
    StaleIndexError,
    WriteError,
)
from actdb.interchange import import_activations
from actdb.making import harvest, hooked, load_model, save_model
from actdb.run import Run
from actdb.selection.streams import Block
from actdb.selection.view import Selection
from actdb.version import __version__

__all__ = [
    "ActdbError",
    "ActivationsError",
    "Block",
    "DamageError",
    "Database",
    "DatabaseError",
    "ModelError",
    "Nearest",
    "Neighbors",
    "OverflowingError",
    "PromptError",
    "QueryResult",
    "Run",
    "RunError",
    "Selection",
    "SelectionError",
    "SettingError",
    "SiteError",
    "SpaceError",
    "SqlError",
    "StaleIndexError",
    "WriteError",
    "__version__",
    "harvest",
    "hooked",
    "import_activations",
    "load_model",
    "open",
    "save_model",
]

if TYPE_CHECKING:
    from actdb import plots as plots
    from actdb.neighbors.result import Nearest, Neighbors
else:

    def __getattr__(name: str) -> object:
        """Import `actdb.plots`, and what searches return, when first asked for: `import actdb` stays fast."""
        from importlib import import_module

        if name == "plots":
            return import_module("actdb.plots")
        if name in ("Nearest", "Neighbors"):
            return getattr(import_module("actdb.neighbors.result"), name)
        raise AttributeError(f"module 'actdb' has no attribute {name!r}")
