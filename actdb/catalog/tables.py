"""Every built-in table and column of the catalog, with type, unit, meaning and formula: one place for both uses."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Column:
    """A column of the catalog: its DuckDB type and what it means, with units and formula."""

    name: str
    type: str
    meaning: str


@dataclass(frozen=True)
class Table:
    """A table of the catalog.

    `statistic` is the name in a plan's `statistics` of one filled from each part's file; columns in `derived` are not
    in that file, but computed from other tables.
    """

    name: str
    meaning: str
    columns: tuple[Column, ...]
    statistic: str | None = None
    derived: tuple[str, ...] = ()


def parse_columns(text: str) -> tuple[Column, ...]:
    """Parse lines of `name TYPE meaning`."""
    return tuple(Column(*line.split(maxsplit=2)) for line in text.strip().splitlines())


SCHEMA: tuple[Table, ...] = (
    Table(
        "models",
        "one row a model that was harvested",
        parse_columns("""
            model VARCHAR name or folder that the model was loaded from
            architecture VARCHAR the model's class in its configuration
            n_layers INTEGER number of layers
            n_heads INTEGER query heads a layer
            n_kv_heads INTEGER key and value heads a layer; fewer than n_heads under grouped queries
            d_model INTEGER width of the residual stream
            d_head INTEGER width of a head
            d_mlp INTEGER neurons of an MLP layer; null without MLPs
            d_vocab INTEGER tokens in the vocabulary
            n_ctx INTEGER longest context, in tokens
        """),
    ),
    Table(
        "runs",
        "one row a run: one harvest of one model over one prompt set",
        parse_columns("""
            run VARCHAR name of the run, its key
            model VARCHAR the model harvested: models.model
            prompt_set VARCHAR content hash of the prompts: prompts.prompt_set
            step BIGINT training step, null where none was given
            status VARCHAR complete, or partial while parts are missing
            random_seed BIGINT seed of a randomly initialised model, null for trained weights
            weights_sha256 VARCHAR hash of the weights
            processing VARCHAR raw, or folded as the old HookedTransformer did
            fold_ln BOOLEAN layer norms folded into the next weights
            center_writing_weights BOOLEAN weights that write to the residual stream centred
            center_unembed BOOLEAN the unembedding centred
            bos BOOLEAN a beginning-of-sequence token was prepended
            dtype VARCHAR dtype the model computed in
            store VARCHAR dtype that is stored
            positions VARCHAR positions that were stored: all or last
            pattern VARCHAR how attention patterns are stored: full, topk:N or none
            causal BOOLEAN attention looks back only, as a probe measured
            hooks_id VARCHAR name given to interventions during the harvest, null without any
            n_prompts BIGINT prompts planned
            n_rows BIGINT rows planned; a row is one (prompt, position)
            n_parts INTEGER parts planned
            n_committed INTEGER parts committed so far
            device VARCHAR device harvested on
            created_at TIMESTAMP when the run was begun, UTC
            actdb_version VARCHAR version of actdb
            torch_version VARCHAR version of PyTorch
            transformer_lens_version VARCHAR version of TransformerLens
        """),
    ),
    Table(
        "sites",
        "one row a run and kind of activation; sizes are of the parts committed so far",
        parse_columns("""
            run VARCHAR runs.run
            site VARCHAR name of the site
            dims VARCHAR[] names of the array's axes
            shape BIGINT[] extents of the array when the run is complete
            dtype VARCHAR stored dtype
            codec VARCHAR lz4 or raw
            raw_bytes BIGINT bytes before encoding
            stored_bytes BIGINT bytes on disk
            max_abs_error DOUBLE largest absolute difference between computed and stored values
        """),
    ),
    Table(
        "prompts",
        "one row a prompt of each prompt set, with one more column a label",
        parse_columns("""
            prompt_set VARCHAR content hash of the prompts
            prompt_id INTEGER number of the prompt in its set, from 0
            text VARCHAR the prompt; null where tokens were given
        """),
    ),
    Table(
        "run_prompts",
        "one row a run and prompt of its committed parts: where its activations lie",
        parse_columns("""
            run VARCHAR runs.run
            prompt_id INTEGER prompts.prompt_id
            n_tokens INTEGER tokens of the prompt that were run, BOS included
            truncated INTEGER tokens cut to fit the context, 0 if none
            part INTEGER the part that holds it
            row_start BIGINT first row in arrays with an axis row
            n_rows INTEGER rows stored: n_tokens, or 1 with positions last
            entry_start BIGINT first entry in arrays with an axis entry (patterns)
            n_entries BIGINT entries stored: n (n + 1) / 2 of causal patterns, n² of others
        """),
    ),
    Table(
        "tokens",
        "one row a token of each prompt of committed parts",
        parse_columns("""
            run VARCHAR runs.run
            prompt_id INTEGER prompts.prompt_id
            pos INTEGER position in the prompt, from 0
            token_id INTEGER id in the vocabulary
            token VARCHAR the token's text; null without a tokenizer
        """),
    ),
    Table(
        "head_stats",
        "one row a run, prompt, layer and head; with w[q, k] the pattern, t the tokens, means over queries q",
        parse_columns("""
            run VARCHAR runs.run
            prompt_id INTEGER prompts.prompt_id
            layer INTEGER the model's layer number, from 0
            head INTEGER query head, from 0
            entropy FLOAT mean over all q of −Σ_k w[q, k] ln w[q, k], in nats
            first_mass FLOAT mean over q ≥ 1 of w[q, 0]; null for one token
            prev_mass FLOAT mean over q ≥ 1 of w[q, q − 1]; null for one token
            self_mass FLOAT mean over all q of w[q, q]
            duplicate_mass FLOAT mean of Σ_k w[q, k], k < q, t[k] = t[q], over the q that have such a k; else null
            induction_mass FLOAT mean of Σ_k w[q, k], 1 ≤ k ≤ q, t[k − 1] = t[q], over the q that have one; else null
            mean_distance FLOAT mean over all q of Σ_k w[q, k] (q − k), in positions
            max_weight FLOAT mean over all q of max_k w[q, k]
            z_norm FLOAT mean over all q of ‖z[q]‖₂, the head's output before W_O
            result_norm FLOAT mean over all q of ‖z[q] W_O‖₂, the head's output in the residual stream; may be null
            direct_logit_attribution FLOAT to the next token, from head_attribution; null without lens statistics
        """),
        statistic="heads",
        derived=("direct_logit_attribution",),
    ),
    Table(
        "neuron_moments",
        "one row a run, part, layer and neuron: sums that neuron_stats merges",
        parse_columns("""
            run VARCHAR runs.run
            layer INTEGER layer
            neuron INTEGER neuron
            n BIGINT rows of the part
            mean DOUBLE mean activation
            m2 DOUBLE Σ (x − mean)²
            m3 DOUBLE Σ (x − mean)³
            max FLOAT highest activation
            n_active BIGINT rows above 0
        """),
        statistic="neurons",
    ),
    Table(
        "neuron_top",
        "the highest activations of each neuron, 16 a run: where it fires most",
        parse_columns("""
            run VARCHAR runs.run
            layer INTEGER layer
            neuron INTEGER neuron
            rank INTEGER from 0, the highest; ties go to the lower prompt, then the lower position
            value FLOAT activation, as computed
            prompt_id INTEGER prompts.prompt_id
            pos INTEGER position in the prompt
        """),
        statistic="neurons",
    ),
    Table(
        "token_stats",
        "one row a run, prompt and position: how well the model predicts the next token",
        parse_columns("""
            run VARCHAR runs.run
            prompt_id INTEGER prompts.prompt_id
            pos INTEGER position; loss and rank speak of predicting pos + 1
            loss FLOAT −ln p of the next token, nats; null at the last position
            entropy FLOAT of the prediction, −Σ p ln p, nats
            rank INTEGER tokens with a higher logit than the next one, from 0; null at the last position
        """),
        statistic="tokens",
    ),
    Table(
        "lens_stats",
        "the logit lens: one row a run, prompt, layer and position; p_l = softmax(norm(resid_post) W_U + b_U)",
        parse_columns("""
            run VARCHAR runs.run
            prompt_id INTEGER prompts.prompt_id
            layer INTEGER layer whose residual stream is read out
            pos INTEGER position; loss and rank speak of predicting pos + 1
            kl FLOAT Σ p ln (p / p_l), p the last layer's: how far from the final prediction, nats
            loss FLOAT −ln p_l of the next token, nats; null at the last position
            entropy FLOAT −Σ p_l ln p_l, nats
            rank INTEGER tokens with a higher logit than the next one, from 0; null at the last position
            top_token_id INTEGER the likeliest token
            top_probability FLOAT its probability
        """),
        statistic="lens",
    ),
    Table(
        "head_attribution",
        "direct logit attribution: one row a run, prompt, layer and head; also a column of head_stats",
        parse_columns("""
            run VARCHAR runs.run
            prompt_id INTEGER prompts.prompt_id
            layer INTEGER layer
            head INTEGER query head
            value FLOAT mean over q < n − 1 of z[q] W_O · centred(w ∘ (W_U[:, t[q + 1]] − mean W_U)) / σ[q]; may be null
        """),
        statistic="lens",
    ),
    Table(
        "statistics",
        "one row a run and kind of statistics: where its figures come from",
        parse_columns("""
            run VARCHAR runs.run
            statistic VARCHAR heads, neurons, tokens or lens
            computed_from VARCHAR activations (in the forward pass, before rounding) or stored (arrays read back)
            n_parts INTEGER parts that have it
        """),
    ),
    Table(
        "results",
        "what analyses wrote back; further columns as they were written",
        parse_columns("""
            analysis VARCHAR name of the analysis
            run VARCHAR runs.run
            key VARCHAR what was measured
            value DOUBLE the value
        """),
    ),
)
"""Every built-in table; the tables are created from it and `actdb sql --schema` prints it."""
BUILT_IN: Mapping[str, Table] = {table.name: table for table in SCHEMA}
PART_TABLES = tuple(table for table in SCHEMA if table.statistic)
