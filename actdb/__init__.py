"""actdb: an activation database for mechanistic interpretability.

`harvest` runs a model once and stores its activations; `open` reads them back: SQL over statistics, lazy slices of
arrays. Importing this package imports neither torch nor zarr nor duckdb; each is imported when it is first needed.
"""

from actdb.database import Database, harvest, open, save_model
from actdb.errors import (
    ActdbError,
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
    WriteError,
)
from actdb.run import Run
from actdb.selection.streams import Block
from actdb.selection.view import Selection
from actdb.version import __version__

__all__ = [
    "ActdbError",
    "Block",
    "DamageError",
    "Database",
    "DatabaseError",
    "ModelError",
    "OverflowingError",
    "PromptError",
    "Run",
    "RunError",
    "Selection",
    "SelectionError",
    "SettingError",
    "SiteError",
    "SpaceError",
    "SqlError",
    "WriteError",
    "__version__",
    "harvest",
    "open",
    "save_model",
]
