"""Every error that actdb raises on purpose.

    ActdbError
    ├── DatabaseError    (ValueError)        the path is no database, or one of a newer format
    ├── DamageError      (OSError)           a stored file is missing, truncated or altered
    ├── RunError         (LookupError)       no such run, or its name is taken by another plan
    ├── SiteError        (LookupError)       no such site in the run or the model
    ├── SelectionError   (IndexError)        a layer, head, prompt or position out of range
    ├── PromptError      (ValueError)        a prompts file or a prompt that cannot be used
    ├── ActivationsError (ValueError)        a file of activations that cannot be imported
    ├── ModelError       (ValueError)        a model that cannot be loaded or harvested as asked
    ├── SettingError     (ValueError)        a setting that does not fit the others
    ├── OverflowingError (OverflowError)     a value that the stored dtype cannot hold
    ├── SpaceError       (OSError)           the disk is full, or would be
    ├── WriteError       (PermissionError)   a database or folder that cannot be written
    ├── StaleIndexError  (ValueError)        an index of neighbours that does not fit the run any more
    └── SqlError         (ValueError)        a query that failed or was refused

Each also inherits the builtin in brackets, so that callers may catch either. Messages are one line: what failed, with
which value, and the valid choices or the next command.
"""


class ActdbError(Exception):
    """Base of all errors that actdb raises on purpose."""


class DatabaseError(ActdbError, ValueError):
    """The path is not an actdb database, or one that this version cannot read."""


class DamageError(ActdbError, OSError):
    """A stored file is missing, truncated or does not match its checksum."""


class RunError(ActdbError, LookupError):
    """A run that does not exist, or whose name is taken by another plan."""


class SiteError(ActdbError, LookupError):
    """A site that the run or the model does not have."""


class SelectionError(ActdbError, IndexError):
    """A layer, head, neuron, prompt or position outside its range."""


class PromptError(ActdbError, ValueError):
    """A prompts file, or a prompt in it, that cannot be used."""


class ActivationsError(ActdbError, ValueError):
    """A file of activations, or a tensor in it, that cannot be imported."""


class ModelError(ActdbError, ValueError):
    """A model that cannot be loaded, or not harvested as asked."""


class SettingError(ActdbError, ValueError):
    """A setting that is unknown, malformed or at odds with another."""


class OverflowingError(ActdbError, OverflowError):
    """An activation that the stored dtype cannot hold."""


class SpaceError(ActdbError, OSError):
    """The disk is full, or would be before the harvest ends."""


class WriteError(ActdbError, PermissionError):
    """A database or folder that cannot be written."""


class SqlError(ActdbError, ValueError):
    """A query that DuckDB rejected, or that actdb refuses to run."""


class StaleIndexError(ActdbError, ValueError):
    """An index of neighbours that does not fit the run any more: it has grown, or was harvested anew."""
