"""From what was measured to claims: the figure, its interval, its null, and what the original said of it."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from analyses.common.report import Claim, claim
from analyses.common.significance import Estimate, mean_interval, proportion_interval
from analyses.feature_persistence.attention import Attention
from analyses.feature_persistence.correlation import Correlation, ImportanceOfFeatures, Share
from analyses.feature_persistence.experiment import Experiments, Finding
from analyses.feature_persistence.null import NullCheck
from analyses.feature_persistence.selection import KINDS, LEVEL, Selectivity
from analyses.feature_persistence.source import Sources
from analyses.feature_persistence.toolkit import Toolkit
from analyses.feature_persistence.tracking import History, chance_persistence, fate, persistence
from analyses.feature_persistence.training import Trained

CLAIMED_ETA = {"token": (0.115, 0.774), "position": (0.115, 0.686)}
SHIPPED_PERSISTENCE = {(0, "token"): 1.00, (0, "position"): 0.96, (1, "token"): 0.72, (1, "position"): 0.32}
CLAIMED_MAINTAINED, GOLD_MAINTAINED = 0.6, 11 / 20
GOLD_FIRST_LOSS, GOLD_LAST_LOSS = 2.35, 0.33
SHARE = (0.0, 1.0)
CLAIMED_COSINES, CLAIMED_QUERY_RATIO = (-0.59, 0.56), 45.0


def initial_claims(found: Sequence[Selectivity], null: NullCheck) -> list[Claim]:
    """Step 1: selective neurons of untrained models, means over seeds."""
    claims = []
    n_layers, n_neurons = found[0].token.p.shape
    for kind in KINDS:
        chance = null.false_positives[kind] / null.n_repetitions
        for layer in range(n_layers):
            counts = [int(item.selective(kind)[layer].sum()) for item in found]
            about = f"neurons of layer {layer} selective for {kind} at p < 0.01 / {n_neurons}, mean over seeds"
            key = f"init.L{layer}.{kind}.n_selective"
            claims.append(claim(key, mean_interval(counts), null=chance, claimed=n_neurons, about=about))
            discovered = [int(item.selective(kind, method="benjamini-hochberg")[layer].sum()) for item in found]
            about = f"the same by Benjamini–Hochberg at a false discovery rate of 0.01, layer {layer}"
            claims.append(claim(f"{key}_bh", mean_interval(discovered), null=chance, about=about))
        for end, pick, stated in zip(("min", "max"), (np.min, np.max), CLAIMED_ETA[kind], strict=True):
            values = [float(pick(item.by_kind(kind).eta_squared)) for item in found]
            about = f"{end}imum η² by {kind} over all neurons, mean over seeds"
            expected = null.expected_eta[kind]
            claims.append(
                claim(f"init.{kind}.eta_{end}", mean_interval(values), null=expected, claimed=stated, about=about)
            )
        values = [float(item.by_kind(kind).omega_squared.mean()) for item in found]
        about = f"mean ω² by {kind}: η² without its upward bias"
        claims.append(claim(f"init.{kind}.omega_mean", mean_interval(values), null=0.0, about=about))
    interaction = [float(item.crossed.interaction.eta_squared.mean()) for item in found]
    df = found[0].crossed.interaction.df_effect
    expected = df / (found[0].n_rows - 1)
    about = "mean η² of the token × position interaction over all neurons"
    return [*claims, claim("init.interaction.eta_mean", mean_interval(interaction), null=expected, about=about)]


def site_claims(found: Mapping[str, Sequence[Selectivity]]) -> list[Claim]:
    """Step 1 for dimensions that are no neurons, by site: means over untrained models."""
    claims = []
    for site, items in found.items():
        for kind in KINDS:
            shares = mean_interval([float(item.selective(kind).mean()) for item in items], within=SHARE)
            about = f"share of the dimensions of {site} (all layers) selective for {kind}, mean over seeds"
            claims.append(
                claim(f"init.{site}.{kind}.selective", shares, null=LEVEL / items[0].token.p.shape[1], about=about)
            )
    return claims


def attention_claims(found: Sequence[Attention]) -> list[Claim]:
    """Step 1: does untrained attention average to 1/n, and does it vary with the input? Means over seeds and heads."""
    n = round(1 / found[0].uniform)
    apart = mean_interval([float(item.distance.mean()) for item in found])
    chance = float(np.mean([item.expected for item in found]))
    verdict = "not uniform" if apart.low > chance else "uniform"
    about = f"greatest |mean weight − 1/{n}| over query and key, mean over heads and seeds; null: sampling alone"
    spread = mean_interval([float(item.deviation.mean()) for item in found])
    return [
        claim("init.attention.distance_from_uniform", apart, null=chance, verdict=verdict, about=about),
        claim(
            "init.attention.deviation",
            spread,
            null=0.0,
            about="standard deviation of an attention weight over inputs, mean over heads, queries, keys and seeds",
        ),
    ]


def null_claims(null: NullCheck) -> list[Claim]:
    """Step 2."""
    claims = []
    for kind in KINDS:
        n = null.n_repetitions * null.n_neurons
        rate = proportion_interval(null.false_positives[kind], n)
        about = f"noise neurons called selective for {kind}, of {n}, at p < 0.01 / {null.n_neurons}"
        allowed = LEVEL / null.n_neurons
        verdict = "as expected" if rate.low <= allowed else "more than allowed"
        claims.append(claim(f"null.{kind}.false_positives", rate, null=allowed, verdict=verdict, about=about))
        about = f"mean η² of noise by {kind}; null: (groups − 1) / (n − 1)"
        expected, mean = null.expected_eta[kind], null.mean_eta[kind]
        agrees = "as expected" if abs(mean / expected - 1) < 0.05 else "not as expected"
        claims.append(Claim(f"null.{kind}.eta_mean", mean, n=n, null=expected, verdict=agrees, about=about))
    return claims


def tracking_claims(main: Trained, history: History, histories: Sequence[History]) -> list[Claim]:
    """Step 3: the neurons of one training, and what became of the top ones of every seed."""
    seed = main.training.seed
    claims = [
        Claim("loss.first", main.first_loss, seed=seed, gold=GOLD_FIRST_LOSS, about="loss of the first batch, nats"),
        Claim("loss.first_epoch", main.first_epoch_loss, seed=seed, about="mean loss of the first epoch, nats"),
        Claim("loss.last", main.last_loss, seed=seed, gold=GOLD_LAST_LOSS, about="mean loss of the last epoch, nats"),
    ]
    values = [history.of(kind, history.top(kind)) for kind in KINDS]
    initial, final = (np.concatenate([v[i].ravel() for v in values]) for i in (0, -1))
    found = fate(initial, final)
    about = "of the 20 most selective neurons, share maintained: final η² > 0.05 and |Δη²| < ½ η²₀"
    kept = proportion_interval(found.maintained, found.n)
    claims.append(
        claim("track.maintained", kept, seed=seed, gold=GOLD_MAINTAINED, claimed=CLAIMED_MAINTAINED, about=about)
    )
    claims.append(Claim("track.changed", found.changed / found.n, n=found.n, seed=seed, gold=9 / 20, about="changed"))
    claims.append(Claim("track.lost", found.lost / found.n, n=found.n, seed=seed, gold=0.0, about="final η² ≤ 0.05"))
    return [*claims, *_fates(histories)]


def _fates(histories: Sequence[History]) -> list[Claim]:
    """The share maintained over seeds: of the top ones, and of all neurons."""
    shares: dict[str, list[float]] = {"top": [], "all": []}
    for history in histories:
        pairs = {
            "top": [(v[0], v[-1]) for v in (history.of(kind, history.top(kind)) for kind in KINDS)],
            "all": [(history.eta[kind][0], history.eta[kind][-1]) for kind in KINDS],
        }
        for which, both in pairs.items():
            found = [fate(*pair) for pair in both]
            shares[which].append(sum(f.maintained for f in found) / sum(f.n for f in found))
    claims = []
    for which, text in (("top", "the 20 most selective"), ("all", "all 256 neurons × kinds: no selection")):
        about = f"share maintained of {text}, mean over seeds"
        stated = CLAIMED_MAINTAINED if which == "top" else None
        claims.append(
            claim(f"track.maintained_{which}", mean_interval(shares[which], within=SHARE), claimed=stated, about=about)
        )
    return claims


def seed_claims(histories: Sequence[History], *, seed: int) -> list[Claim]:
    """Step 4: persistence over seeds by layer and kind; is it position that persists more?"""
    claims = []
    top = {kind: np.stack([persistence(h, kind) for h in histories]) for kind in KINDS}  # [seed, layer]
    every = {kind: np.stack([persistence(h, kind, top=False) for h in histories]) for kind in KINDS}
    chance = {kind: np.stack([chance_persistence(h, kind, seed=seed) for h in histories]) for kind in KINDS}
    for (layer, kind), shipped in SHIPPED_PERSISTENCE.items():
        about = f"share of the top 5 of layer {layer} by {kind} with final η² > 0.05 and > ½ initial; null: shuffled"
        null = float(chance[kind][:, layer].mean())
        estimate = mean_interval(top[kind][:, layer], within=SHARE)
        claims.append(claim(f"seeds.L{layer}.{kind}.persistence", estimate, null=null, gold=shipped, about=about))
        about = f"the same for all neurons of layer {layer}"
        claims.append(
            claim(
                f"seeds.L{layer}.{kind}.persistence_all",
                mean_interval(every[kind][:, layer], within=SHARE),
                about=about,
            )
        )
    for which, shares in (("", top), ("_all", every)):
        difference = mean_interval((shares["position"] - shares["token"]).mean(1))
        more = "position persists more" if difference.low > 0 else "token persists more" if difference.high < 0 else ""
        about = "persistence of position − token, both layers; the original claims that position persists more"
        verdict = more or "no difference"
        claims.append(claim(f"seeds.position_minus_token{which}", difference, null=0.0, verdict=verdict, about=about))
    return claims


def correlation_claims(
    correlations: Mapping[tuple[int, str], Correlation],
    shares: Mapping[str, Mapping[str, Share]],
    losses: Mapping[str, npt.NDArray[np.float64]],
    importances: Mapping[str, ImportanceOfFeatures],
) -> list[Claim]:
    """Step 5."""
    claims = []
    for (layer, kind), found in correlations.items():
        key, about = f"correlate.L{layer}.{kind}", f"Spearman's ρ over the neurons of layer {layer}, {kind}: initial η²"
        claims.append(claim(f"{key}.final", found.with_final, null=0.0, about=f"{about} with final η²"))
        about = f"{about} with whether it persists; null: neurons shuffled"
        claims.append(claim(f"{key}.persistence", found.with_persistence, null=found.chance, about=about))
    for group, by_kind in shares.items():
        loss = float(losses[group].mean())
        for kind, share in by_kind.items():
            about = f"share of top neurons by {kind} that persist; last loss {loss:.2f} nats; null: shuffled"
            claims.append(
                claim(f"variant.{group}.{kind}.persistence", share.persisting, null=share.chance, about=about)
            )
    for kind, related in importances.items():
        about = f"Spearman's ρ of the loss when a neuron is mean-ablated with its final η² by {kind}"
        claims.append(claim(f"importance.{kind}.with_eta", related.with_eta, null=0.0, about=about))
        about = f"mean rise of the loss, nats, ablating a neuron whose high η² by {kind} persisted; null: other neurons"
        null = related.others.value
        claims.append(claim(f"importance.{kind}.persistent", related.persistent, null=null, about=about))
    return claims


def source_claims(found: Sequence[Sources], gaussian: tuple[float, float, float], sums: float) -> list[Claim]:
    """Step 6: means over untrained models; the null is Gaussian vectors of the same shape."""
    lowest = mean_interval([float(item.token_cosines.min()) for item in found])
    highest = mean_interval([float(item.token_cosines.max()) for item in found])
    size = mean_interval([float(np.abs(item.sum_cosines).mean()) for item in found])
    low, high = CLAIMED_COSINES
    about = "cosine among the 10 token embeddings, mean over seeds; null: Gaussian vectors"
    claims = [
        claim("source.token_cosine_min", lowest, null=gaussian[0], claimed=low, about=f"smallest {about}"),
        claim("source.token_cosine_max", highest, null=gaussian[1], claimed=high, about=f"largest {about}"),
        claim("source.sum_cosine", size, null=sums, about="mean |cos| of the 80 token + position sums; null: Gaussian"),
    ]
    for layer in range(len(found[0].query_ratio)):
        ratio = [float(np.log10(item.query_ratio[layer])) for item in found]
        mean = mean_interval(ratio)
        estimate = Estimate(10**mean.value, 10**mean.low, 10**mean.high, mean.n)
        about = f"largest ÷ smallest singular value of W_Q in layer {layer}, geometric mean over seeds"
        claims.append(claim(f"source.query_ratio.L{layer}", estimate, claimed=CLAIMED_QUERY_RATIO, about=about))
    return claims


def experiment_claims(name: str, found: Sequence[Experiments], *, seed: int) -> list[Claim]:
    """Step 7: means over networks of one kind, the null of each beside."""
    n_distinct = found[0].circuits.n_distinct_first
    texts: dict[str, tuple[Callable[[Experiments], Finding], str]] = {
        "features.purity": (
            lambda e: e.purity,
            "share of a neuron's 16 top inputs that are one token; null: random inputs",
        ),
        "hypothesis.effect": (lambda e: e.effect, "greatest |Cohen's d| of token 5 at position 2; null: rows shuffled"),
        "hypothesis.telling": (lambda e: e.telling, "share of neurons that tell token 5 at position 2 from the rest"),
        "mapping.token": (lambda e: e.mapping["token"], "share of neurons selective for token"),
        "mapping.position": (lambda e: e.mapping["position"], "share of neurons selective for position"),
        "circuits.correlated": (
            lambda e: e.circuits.correlated,
            "share of pairs of neurons with r > 0.8, all positions",
        ),
        "circuits.opposed": (lambda e: e.circuits.opposed, "share of pairs of neurons with r < −0.8, all positions"),
        "circuits.correlated_first": (
            lambda e: Finding(e.circuits.first_correlated, e.circuits.correlated.value, n_distinct),
            f"r > 0.8 at position 0 alone, as the original: {n_distinct} distinct vectors; null: all positions",
        ),
        "circuits.opposed_first": (
            lambda e: Finding(e.circuits.first_opposed, e.circuits.opposed.value, n_distinct),
            f"r < −0.8 at position 0 alone: {n_distinct} distinct vectors; null: all positions",
        ),
        "structures.mean": (
            lambda e: e.structures["mean"],
            "neurons whose mean over a prompt differs by kind of sequence",
        ),
        "structures.deviation": (
            lambda e: e.structures["deviation"],
            "the same of the standard deviation over a prompt",
        ),
    }
    claims = []
    for key, (pick, about) in texts.items():
        findings = [pick(item) for item in found]
        upper = np.inf if key == "hypothesis.effect" else 1.0
        value = mean_interval([finding.value for finding in findings], within=(0.0, upper))
        null = float(np.mean([finding.null for finding in findings]))
        claims.append(claim(f"{name}.{key}", value, seed=seed, null=null, about=about))
    return claims


def toolkit_claims(found: Toolkit, *, seed: int) -> list[Claim]:
    """Step 8."""
    claims = []
    for i, layer in enumerate(found.lens.layers):
        for measure, text in (
            ("agreement", "rows whose likeliest token is the last layer's"),
            ("accuracy", "rows whose likeliest token comes next"),
            ("rank", "mean rank of the next token, from 0"),
            ("kl", "KL(last ‖ lens), nats"),
        ):
            value = float(getattr(found.lens, measure)[i])
            claims.append(Claim(f"lens.L{layer}.{measure}", value, n=found.lens.n_rows, seed=seed, about=text))
    for name, rise in found.ablations.items():
        about = "rise of the loss, nats a token, on structured sequences"
        claims.append(claim(f"ablate.{_key(name)}", rise, seed=seed, null=0.0, about=about))
    for prefix, estimates in (("patch", found.patches), ("path", found.paths)):
        for name, share in estimates.items():
            about = "share of the loss between two ascending sequences that patching this alone restores"
            claims.append(claim(f"{prefix}.{_key(name)}", share, seed=seed, null=0.0, about=about))
    return claims


def _key(name: str) -> str:
    return name.replace(" → ", "_to_").replace(" ", "_")
