"""What the catalog makes of statistics once the rows of new parts are in their tables."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from actdb.schema import N_TOP
from actdb.storage.commits import Snapshot

if TYPE_CHECKING:
    import duckdb

_RUNS = "(SELECT unnest($runs::VARCHAR[]))"


def compact_top(connection: "duckdb.DuckDBPyConnection", runs: Iterable[str]) -> None:
    """Keep the highest activations of each neuron over all parts of runs that have new ones."""
    parameters = {"runs": sorted(runs)}
    connection.execute(
        "CREATE OR REPLACE TEMP TABLE highest AS SELECT run, layer, neuron, (row_number() OVER "
        "(PARTITION BY run, layer, neuron ORDER BY value DESC, prompt_id, pos) - 1)::INTEGER AS place, "
        f"value, prompt_id, pos FROM neuron_top WHERE run IN {_RUNS} QUALIFY place < {N_TOP}",
        parameters,
    )
    connection.execute(f"DELETE FROM neuron_top WHERE run IN {_RUNS}", parameters)
    connection.execute("INSERT INTO neuron_top SELECT * FROM temp.highest ORDER BY run, layer, neuron, place")
    connection.execute("DROP TABLE temp.highest")


def attribute_heads(connection: "duckdb.DuckDBPyConnection", runs: Iterable[str]) -> None:
    """Fill the direct logit attribution of heads in where both tables have them."""
    connection.execute(
        "UPDATE head_stats h SET direct_logit_attribution = a.value FROM head_attribution a"
        f" WHERE h.run IN {_RUNS} AND h.direct_logit_attribution IS NULL"
        " AND (h.run, h.prompt_id, h.layer, h.head) = (a.run, a.prompt_id, a.layer, a.head)",
        {"runs": sorted(runs)},
    )


def statistics_rows(snapshot: Snapshot) -> list[dict[str, Any]]:
    """Return the rows of the table `statistics`."""
    rows = []
    for name, run in snapshot.runs.items():
        counts = {(kind, "activations"): len(run.parts) for kind in run.harvested}
        counts |= {(kind, "stored"): len({*parts} & {*run.parts}) for kind, parts in run.later.items()}
        rows += [
            {"run": name, "statistic": kind, "computed_from": source, "n_parts": n}
            for (kind, source), n in counts.items()
        ]
    return rows
