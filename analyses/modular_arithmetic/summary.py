"""What the claims of steps 1 to 3 say, in words, for the report."""

from collections.abc import Mapping, Sequence

from analyses.common.report import Claim


def describe(claims: Sequence[Claim]) -> dict[str, str]:
    """Return sections by heading; what is not among the claims is left out."""
    by_key = {entry.key: entry for entry in claims}
    keys = list(dict.fromkeys(key.partition(".")[0] for key in by_key if key.endswith(".fourier.n_keys")))
    found = {
        "Does it grok?": [_course(by_key, key) for key in keys],
        "Does it compute with a few frequencies?": [_frequencies(by_key, key) for key in keys],
        "Is the structure causally used?": [_causes(by_key, key) for key in keys],
        "What the original claims": _original(by_key),
    }
    return {heading: "\n".join(f"- {line}" for line in lines if line) for heading, lines in found.items() if any(lines)}


def _course(claims: Mapping[str, Claim], key: str) -> str:
    if f"{key}.epoch.memorised" not in claims:
        return ""
    memorised, train = claims[f"{key}.epoch.memorised"], claims[f"{key}.accuracy.train"]
    text = f"{key}: 99 % of the training pairs {_when(memorised)}, at the end {train.value:.1%}"
    if f"{key}.epoch.grokked" not in claims:
        return f"{text}; no pair was held out."
    grokked, test = claims[f"{key}.epoch.grokked"], claims[f"{key}.accuracy.test"]
    text += f"; of the held-out ones {_when(grokked)}, at the end {test.value:.1%}."
    if f"{key}.formed.restricted_loss" in claims:
        restricted, excluded = (claims[f"{key}.formed.{name}_loss"] for name in ("restricted", "excluded"))
        text += (
            f" Between memorisation and epoch {claims[f'{key}.epoch.turning'].value:.0f}, where the held-out loss is "
            f"highest, the restricted loss went from {restricted.null:.3g} to {restricted.value:.3g} nats, the "
            f"excluded one from {excluded.null:.3g} to {excluded.value:.3g}."
        )
    return text


def _when(epoch: Claim) -> str:
    return "never" if epoch.verdict == "never" else f"at epoch {epoch.value:.0f}"


def _frequencies(claims: Mapping[str, Claim], key: str) -> str:
    n, share = claims[f"{key}.fourier.n_keys"], claims[f"{key}.fourier.key_share"]
    text = f"{key}: {n.value:.0f} key frequencies of {n.n} with {share.value:.1%} of the embedding's variance"
    if share.null:
        text += f" (random matrices: {share.null:.1%})"
    restricted, excluded = claims.get(f"{key}.loss.restricted"), claims.get(f"{key}.loss.excluded")
    if restricted is None or excluded is None or not n.value:
        return f"{text}."
    own, trained = claims[f"{key}.loss.all"], claims[f"{key}.loss.train"]
    return (
        f"{text}. Loss over all pairs {own.value:.3g} nats, of the waves alone {restricted.value:.3g} "
        f"({restricted.verdict}); over training pairs {trained.value:.3g}, without the waves {excluded.value:.3g} "
        f"({excluded.verdict})."
    )


def _causes(claims: Mapping[str, Claim], key: str) -> str:
    means = {
        name.removeprefix(f"{key}.mean."): entry for name, entry in claims.items() if name.startswith(f"{key}.mean.")
    }
    if not means:
        return ""
    parts = ", ".join(f"{name.replace('_', ' ')} {entry.value:.2f}" for name, entry in means.items())
    text = f"{key}: accuracy lost by mean ablation: {parts}."
    without = claims.get(f"{key}.directions.without_keys")
    if without is not None:
        only = claims[f"{key}.directions.only_keys"]
        text += (
            f" Without the {without.n} waves of the key frequencies the accuracy is {without.value:.3f}, "
            f"without as many random directions {without.null:.3f}; with those waves alone {only.value:.3f}, with as "
            f"many random directions alone {only.null:.3f}."
        )
    return text


def _original(claims: Mapping[str, Claim]) -> list[str]:
    lines = ["alignment 1.0: true of any matrix, since its basis is complete; no evidence of anything."]
    for key, entry in claims.items():
        if entry.claimed is not None and ".mean." in key:
            stored = "" if entry.gold is None else f", its stored results {entry.gold:.2f}"
            lines.append(
                f"{key}: claimed {entry.claimed:.2f} (a constant in the plotting script){stored}; "
                f"measured {entry.value:.2f}."
            )
    return lines
