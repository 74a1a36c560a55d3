"""What travels with activations: the labels of prompts, and the token of each row."""

from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from actdb.errors import DamageError
from actdb.schema import RunInfo
from actdb.storage.commits import RUNS, read_run, read_run_file
from actdb.storage.folder import Folder

if TYPE_CHECKING:
    import pyarrow as pa

    from actdb.selection.view import Selection

Ints = npt.NDArray[np.int64]


class PromptTable:
    """Labels and tokens of a run's prompts, read when first needed: some 8 bytes a token of the run, kept."""

    def __init__(self, folder: Folder, info: RunInfo) -> None:
        self._folder, self._info = folder, info

    @classmethod
    def of(cls, selection: "Selection") -> "PromptTable":
        """Return the table of the run that a selection reads from."""
        reader = selection._source.reader
        return cls(reader._folder, read_run(reader._folder, reader._run))

    @property
    def info(self) -> RunInfo:
        """What was planned for the run."""
        return self._info

    @cached_property
    def labels(self) -> Mapping[str, "pa.ChunkedArray"]:
        """Label columns by name, one value a prompt id, null where a prompt lacks it."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        name = f"{RUNS}/{self._info.name}/prompts.parquet"
        try:
            table = pq.read_table(pa.BufferReader(read_run_file(self._folder, self._info, name)))
        except pa.ArrowException as exc:
            raise DamageError(f"{self._folder.path(name)} is damaged; run the same harvest again") from exc
        if "labels" not in table.column_names:
            return {}
        fields = table.select(["labels"]).flatten()
        return {column.removeprefix("labels."): fields.column(column) for column in fields.column_names}

    @cached_property
    def _tokens(self) -> "pa.Table":
        import pyarrow as pa
        import pyarrow.parquet as pq

        name = f"{RUNS}/{self._info.name}/tokens.parquet"
        columns = ["prompt_id", "token_id", "token"]
        try:
            table = pq.read_table(self._folder.inside(name), columns=columns, read_dictionary=["token"])
        except (FileNotFoundError, pa.ArrowException, OSError) as exc:
            raise DamageError(f"{self._folder.path(name)} is missing or damaged; run the same harvest again") from exc
        return table.combine_chunks()

    @cached_property
    def _starts(self) -> Ints:
        owners = self._tokens.column("prompt_id").to_numpy()
        return np.searchsorted(owners, np.arange(self._info.n_prompts + 1))

    def token_ids(self, prompt: Ints, pos: Ints) -> npt.NDArray[np.int32]:
        """Return the token id at each (prompt, position)."""
        ids = self._tokens.column("token_id").to_numpy()
        return np.asarray(ids[self._starts[prompt] + pos], np.int32)

    def token_texts(self, prompt: Ints, pos: Ints) -> "pa.Array":
        """Return the token text at each (prompt, position) as an Arrow string array."""
        import pyarrow as pa

        taken = self._tokens.column("token").take(pa.array(self._starts[prompt] + pos))
        return taken.combine_chunks().dictionary_decode()

    def vocabulary(self, ids: npt.NDArray[np.int32]) -> list[str]:
        """Return the text of token ids that occur in the run; costs one scan of its tokens."""
        every, first = np.unique(self._tokens.column("token_id").to_numpy(), return_index=True)
        places = first[np.searchsorted(every, ids)]
        return [str(text) for text in self._tokens.column("token").take(places).to_pylist()]
