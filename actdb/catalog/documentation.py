"""What `actdb sql --schema` prints: every table, view, column and function, with types, units and formulas."""

from collections.abc import Mapping
from dataclasses import dataclass

from actdb.catalog.tables import BUILT_IN, SCHEMA, Table
from actdb.catalog.views import VIEWS, View
from actdb.errors import SqlError


@dataclass(frozen=True)
class Function:
    """An SQL function on stored activations: typed parameters, what it returns, what it means, and a query."""

    name: str
    parameters: tuple[tuple[str, str], ...]
    returns: str
    meaning: str
    example: str

    @property
    def signature(self) -> str:
        """The call with its parameters' types."""
        parameters = ", ".join(f"{name} {kind}" for name, kind in self.parameters)
        return f"{self.name}({parameters}, run VARCHAR := '')"


_PLACE = (("prompt_id", "BIGINT"), ("pos", "BIGINT"))
_RULES = (
    "Functions read stored activations. A negative pos or query counts from the prompt's end; any NULL gives NULL;\n"
    "run is the only or newest run unless given, as in activation('resid_post', 6, 17, -1, run := 'gpt2-small').\n"
    "list_cosine_similarity, list_dot_product, list_sum and the like work on what they return."
)
FUNCTIONS = (
    Function(
        "activation",
        (("site", "VARCHAR"), ("layer", "BIGINT"), *_PLACE),
        "FLOAT[]",
        "one vector of a site without heads (resid_post, mlp_post, ...), layer 0 for a site without layers",
        "SELECT pos, list_cosine_similarity(activation('resid_post', 0, prompt_id, pos),"
        " activation('resid_post', 1, prompt_id, pos)) AS kept FROM tokens WHERE prompt_id = 3",
    ),
    Function(
        "head_activation",
        (("site", "VARCHAR"), ("layer", "BIGINT"), ("head", "BIGINT"), *_PLACE),
        "FLOAT[]",
        "one vector of a site with heads (z, q; k and v by kv head)",
        "SELECT prompt_id, head_activation('z', 1, 0, prompt_id, -1) AS z FROM run_prompts",
    ),
    Function(
        "attention",
        (("layer", "BIGINT"), ("head", "BIGINT"), ("prompt_id", "BIGINT"), ("query", "BIGINT")),
        "FLOAT[]",
        "the attention weights of one query on positions 0, 1, ...: query + 1 of causal models, n_tokens of others",
        "SELECT pos, attention(1, 0, prompt_id, pos)[pos] AS on_previous FROM tokens WHERE prompt_id = 3 AND pos > 0",
    ),
    Function(
        "interaction",
        (*((name, "BIGINT") for name in ("layer_a", "head_a", "layer_b", "head_b")), ("prompt_id", "BIGINT")),
        "FLOAT",
        "what head B's last query reads of what head A wrote, sum over s of attention_B[s] ‖z_A[s] W_O^A‖, 0 unless"
        " layer_a < layer_b; from the site interaction, which analyses.forward_proportion adds",
        "SELECT prompt_id, interaction(0, 1, 1, 0, prompt_id) AS read FROM run_prompts ORDER BY read DESC LIMIT 3",
    ),
    Function(
        "logit_lens",
        (("layer", "BIGINT"), *_PLACE, ("k", "BIGINT")),
        "STRUCT(token_id INTEGER, token VARCHAR, logit FLOAT, probability FLOAT)[]",
        "the k likeliest next tokens by norm(resid_post) W_U + b_U with the final norm, likeliest first;"
        " token is null where the run's prompts do not hold it",
        "SELECT layer, logit_lens(layer, 3, -1, 1)[1].token AS guess FROM range(4) t(layer)",
    ),
)
SIGNATURES: Mapping[str, str] = {function.name: function.signature for function in FUNCTIONS}
"""Each function's call with its parameters' types, by name."""


def schema_text(name: str | None = None) -> str:
    """Return the documentation of a built-in table, view or function, or of all; raises `SqlError` for another name."""
    if name is None:
        relations = [*map(_describe, SCHEMA), *map(_describe, VIEWS)]
        return "\n\n".join([*relations, _RULES, *map(_describe_function, FUNCTIONS)])
    relation = BUILT_IN.get(name) or next((view for view in VIEWS if view.name == name), None)
    if relation is not None:
        return _describe(relation)
    function = next((function for function in FUNCTIONS if function.name == name), None)
    if function is None:
        names = [*BUILT_IN, *(view.name for view in VIEWS), *SIGNATURES]
        raise SqlError(f"no built-in table, view or function {name!r}; choose from {', '.join(names)}")
    return _describe_function(function)


def _describe(relation: Table | View) -> str:
    names, types = (max(len(getattr(c, key)) for c in relation.columns) for key in ("name", "type"))
    lines = [f"  {c.name:<{names}}  {c.type:<{types}}  {c.meaning}" for c in relation.columns]
    return "\n".join([f"{relation.name}: {relation.meaning}", *lines])


def _describe_function(function: Function) -> str:
    return "\n".join([f"{function.signature} -> {function.returns}", f"  {function.meaning}", f"  {function.example}"])
