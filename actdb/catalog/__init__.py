"""The catalog: native DuckDB tables derived from a database's Parquet files, and the only way SQL reaches them.

`catalog.duckdb` holds nothing that cannot be made again. It is stamped with the digest of the snapshot that it was made
from; a reader that finds it stale copies it, adds what is new and renames the copy into place, or builds it in memory
where the folder cannot be written. Connections given out read it with DuckDB's external access off, so that no query,
and no view that a hostile catalog may hold, reads or writes a file.
"""

from actdb.catalog.comparison import compare_runs
from actdb.catalog.connection import check_catalog, connect, cursor, discard
from actdb.catalog.documentation import SIGNATURES, schema_text
from actdb.catalog.functions import add_functions
from actdb.catalog.names import check_table_name, distinct_names, label_columns, one_line, quote
from actdb.catalog.query import QueryResult, check_select, matching_prompts, run_query, words
from actdb.catalog.tables import SCHEMA
from actdb.catalog.views import VIEWS

__all__ = [
    "SCHEMA",
    "SIGNATURES",
    "VIEWS",
    "QueryResult",
    "add_functions",
    "check_catalog",
    "check_select",
    "check_table_name",
    "compare_runs",
    "connect",
    "cursor",
    "discard",
    "distinct_names",
    "label_columns",
    "matching_prompts",
    "one_line",
    "quote",
    "run_query",
    "schema_text",
    "words",
]
