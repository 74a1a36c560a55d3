"""What a command line asks for: the study's own models, a model of the user's, or a run that is there already."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import actdb
from analyses.common.program import Options, Study, note
from analyses.semantic_head import claims as claiming
from analyses.semantic_head.category import find_categories
from analyses.semantic_head.existing import run_existing
from analyses.semantic_head.planted import build_control, build_model, planted_categories, planted_place
from analyses.semantic_head.reference import GPT2, Known, Reference
from analyses.semantic_head.report import sections
from analyses.semantic_head.score import Ranked
from analyses.semantic_head.study import HeadStudy, rank_all
from analyses.semantic_head.subject import FULL, SMALL, Extent, Head, Subject

GPT2_NAMES = ("gpt2", "gpt2-small")
GPT2_HEAD = (1, 5)
GPT2_SHAPE = (12, 12, 768)


def run_study(options: Options) -> Study:
    """Do what the options ask for; see the steps in the folder's README."""
    if options.given_db and options.model is None:
        return run_existing(options)
    if options.model is None:
        return _run_own(options)
    return _run_model(options)


def _run_own(options: Options) -> Study:
    """The hand-built model, and the same shape with random weights as its control."""
    extent = _extent(options)
    categories = planted_categories()
    model, control = build_model(seed=options.seed), build_control(seed=options.seed)
    name = _run_name("hand-built", options)
    subject = Subject(name, model, categories, options.db, extent, options.seed)
    control = replace(subject, name=_run_name("random-control", options), model=control)
    place = planted_place()
    known = {
        "symmetric.rank": Known(gold=place.n_positive + place.n_negative),
        "symmetric.n_positive": Known(gold=place.n_positive),
        "symmetric.n_negative": Known(gold=place.n_negative),
        "community.agreement": Known(gold=1.0),
    }
    study = _study(subject, options, Reference(known))
    beside = _study(control, options, Reference(), folder=options.figures / "control")
    entries = [*study.claims, *claiming.prefix_claims("control", beside.claims)]
    text = {**study.text, **{f"Control: {name}": body for name, body in beside.text.items()}}
    return Study(study.run, entries, text=text, figures=study.figures)


def _run_model(options: Options) -> Study:
    """A model that the user names."""
    own = options.own
    note(f"loading {options.model}")
    model = actdb.load_model(
        str(options.model), tokenizer=own.tokenizer, random_init=own.random_init, processing="folded"
    )
    short = Path(str(options.model)).name
    name = short if own.random_init is None else f"{short}-random{own.random_init}"
    categories = find_categories(model.tokenizer, d_vocab=int(model.cfg.d_vocab), seed=options.seed)
    subject = Subject(
        _run_name(name, options), model, categories, options.db, _extent(options), options.seed, text=options.prompts
    )
    return _study(subject, options, _reference(model, short, own.random_init is None))


def _study(subject: Subject, options: Options, reference: Reference, *, folder: Path | None = None) -> Study:
    """Rank all heads and, unless only that is asked for, study one."""
    ranked = rank_all(subject)
    run = f"{subject.name}-words"
    if options.own.all_heads:
        found = claiming.ranking_claims(ranked, seed=options.seed, n=len(ranked))
        return Study(run, [entry.judged() for entry in found])
    layer, head, n_chosen_from = _choose(subject.model, options, ranked)
    study = HeadStudy(
        Head(subject, layer, head),
        ranked,
        reference=reference,
        figures=folder or options.figures,
        n_chosen_from=n_chosen_from,
    )
    entries = study.all()
    return Study(run, entries, text=sections(study.head, entries), figures=study.figures)


def _run_name(name: str, options: Options) -> str:
    """Return what the names of a model's runs begin with: sizes share no run, and `--run` tells other studies apart."""
    base = name if options.run is None else f"{options.run}-{name}" if options.model is None else options.run
    return f"{base}-small" if options.small else base


def _choose(model: Any, options: Options, ranked: list[Ranked]) -> tuple[int, int, int]:
    """Return layer, head, and how many heads they were chosen from.

    Unless asked for one it is the head that the categories make most of a difference to: the best score alone may be
    that of a head which attends to everything alike.
    """
    layer, head = options.own.layer, options.own.head
    if (layer is None) != (head is None):
        raise actdb.SettingError("--layer and --head go together")
    if layer is not None:
        if (layer, head) not in {(entry.layer, entry.head) for entry in ranked}:
            last = max((entry.layer, entry.head) for entry in ranked)
            raise actdb.SettingError(
                f"--layer {layer} --head {head}: there are layers 0 to {last[0]}, heads 0 to {last[1]}"
            )
        return layer, head, 1
    if options.model is not None and Path(options.model).name in GPT2_NAMES:
        return *GPT2_HEAD, 1
    best = max(ranked, key=lambda entry: entry.shuffled - entry.score)
    return best.layer, best.head, len(ranked)


def _reference(model: Any, name: str, trained: bool) -> Reference:
    """What is known of gpt2-small's L1H5 stands beside models of its shape, and judges only its own weights."""
    cfg = model.cfg
    alike = (cfg.n_layers, cfg.n_heads, cfg.d_model) == GPT2_SHAPE
    return Reference(GPT2 if alike else {}, is_present=trained and name in GPT2_NAMES)


def _extent(options: Options) -> Extent:
    extent = SMALL if options.small else FULL
    wanted = options.own.vocabulary
    if wanted is None:
        return extent
    if wanted < 64:
        raise actdb.SettingError(f"--vocabulary {wanted}: at least 64 tokens")
    return replace(extent, n_vocabulary=wanted)
