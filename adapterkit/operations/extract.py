"""extract: the difference of a tuned model and its base, as an adapter."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from adapterkit.adapter import Adapter, Receipt
from adapterkit.checkpoint import Checkpoint, Model, open_checkpoint
from adapterkit.deltas import Change, Whole
from adapterkit.errors import Json, Refused, StoreError, UsageError, located
from adapterkit.extraction import HIGHEST, Found, Progress, Settings, compare, remaining, suspicious
from adapterkit.linalg.devices import device_of
from adapterkit.operations.convert import Conversion, ConvertOptions, Verify, write_plan
from adapterkit.operations.sources import load
from adapterkit.pairing import Line, Pairing, pair
from adapterkit.plan import Options, Plan
from adapterkit.ranks import RankRule
from adapterkit.reduction import Part, Reduction, fitted
from adapterkit.specs.families import Family, Place, Target
from adapterkit.specs.layouts import layouts
from adapterkit.specs.tuner_config import TunerConfig
from adapterkit.stores import torch_dtype
from adapterkit.stores.guards import shown
from adapterkit.stores.model_folder import CONFIG

_DTYPES = {"fp32": "F32", "fp16": "F16", "bf16": "BF16"}
# About so many modules are compared with what was written.
_SAMPLE = 16
# What remains of each line, in the order in which a tensor that several lines share is counted.
OUTCOMES = ("extracted", "whole")


@dataclass(frozen=True)
class ExtractOptions:
    """How to extract; every field has a command-line option of its name.

    to: the format; None: kohya, or PEFT for language models.
    dtype: "fp32", "fp16" or "bf16" for the factors; None: that of most of the tuned model's weights,
    fp16 for a dtype of one byte.
    alpha: written beside every module; None: its rank, so that the scale is 1.
    full_small: keep the changes of vectors (norms, biases) as they are.
    embeddings: extract embeddings and output layers, too.
    only, exclude: components, blocks or modules by name, with wildcards.
    exact: singular values to rounding instead of within a thousandth of the least error.
    device: where to compute, such as "cuda"; None: the processor.  seed: of the random start.
    family: the base model, where the names do not tell.
    allow: "nonfinite", and what `make_plan` takes.
    verify, force: see `ConvertOptions`.
    """

    to: str | None = None
    dtype: str | None = None
    alpha: float | None = None
    full_small: bool = False
    embeddings: bool = False
    only: Sequence[str] = ()
    exclude: Sequence[str] = ()
    exact: bool = False
    device: str | None = None
    seed: int = 0
    family: str | None = None
    allow: Collection[str] = field(default_factory=frozenset)
    verify: Verify = "sample"
    force: bool = False


@dataclass(frozen=True)
class Outcome:
    """What became of one line.

    what: "extracted", "whole", "unchanged", "noise" (nothing of it stands out), "nonfinite",
    "untranslatable" (the format cannot say it, by consent), or the form of a tensor that was not asked
    for ("vector", "embedding", "head", "parameter", "experts").
    rank: of what was extracted.  change: ‖tuned − base‖ / ‖base‖.  energy: ‖tuned − base‖².
    left: the part of the energy that is not in the adapter.
    """

    line: Line
    what: str
    rank: int
    change: float
    energy: float
    left: float

    @property
    def error(self) -> float:
        """‖tuned − base − adapter‖ / ‖tuned − base‖."""
        return math.sqrt(min(1.0, self.left / self.energy)) if self.energy else 0.0


@dataclass(frozen=True)
class Proof:
    """The relative error of some modules: as the written file and both models say, and as predicted."""

    modules: int
    measured: float
    predicted: float


@dataclass(frozen=True, eq=False)
class Extraction:
    """The adapter that was extracted, and what it leaves out.

    conversion: the files, if any were written.
    proof: what reading them back showed, unless that was not wanted.
    suspicious: whether the difference is so large that the base can hardly be the right one.
    """

    pairing: Pairing
    outcomes: tuple[Outcome, ...]
    plan: Plan
    reduction: Reduction
    rule: RankRule
    suspicious: bool
    conversion: Conversion | None = None
    proof: Proof | None = None

    @property
    def adapter(self) -> Adapter:
        """The adapter in memory."""
        return self.plan.adapter

    def state_dict(self) -> dict[str, Tensor]:
        """Its tensors, as the format has them."""
        return self.plan.state_dict()

    @property
    def energy(self) -> float:
        """‖tuned − base‖² of all that was compared."""
        return math.fsum(outcome.energy for outcome in self.outcomes if math.isfinite(outcome.energy))

    @property
    def left(self) -> Mapping[str, float]:
        """The energy that is not in the adapter, by why: "rank" for what the ranks cut off."""
        found: dict[str, float] = {}
        for outcome in self.outcomes:
            if math.isfinite(outcome.left) and outcome.left:
                why = "rank" if outcome.what == "extracted" else outcome.what
                found[why] = found.get(why, 0.0) + outcome.left
        return found

    @property
    def kept(self) -> float:
        """The share of the difference's energy that is in the adapter."""
        return 1.0 - math.fsum(self.left.values()) / self.energy if self.energy else 1.0

    @cached_property
    def tensors(self) -> Mapping[str, str]:
        """What became of each tensor of the tuned model, by its key: all of them, each once."""
        found = dict(self.pairing.apart)
        for outcome in sorted(self.outcomes, key=lambda outcome: outcome.what in OUTCOMES):
            found.update(dict.fromkeys(outcome.line.keys, outcome.what))
        return {key: found[key] for key in self.pairing.tuned.store.tensors}


def default_target(family: Family) -> str:
    """The format that extracted adapters have if none is asked for: the one that trainers write."""
    names = family.target_names()
    return next(name for name in ("kohya", "peft", *names) if name in names)


def plan_extraction(tuned: Model, base: Model, options: ExtractOptions | None = None) -> Pairing:
    """What `extract` would compare, told from the headers alone.

    Raises what opening raises, Mismatch for two models, UsageError for an unknown format or name.
    """
    options = options or ExtractOptions()
    with ExitStack() as opened:
        return _paired(tuned, base, options, opened)


def extract(
    tuned: Model,
    base: Model,
    output: str | Path | None = None,
    rule: RankRule | None = None,
    options: ExtractOptions | None = None,
    *,
    progress: Progress | None = None,
) -> Extraction:
    """The difference of two models as an adapter; written to `output` if one is given.

    tuned, base: files, folders, stores or state dicts, each in any layout.
    rule: how many ranks; None: all that stand out of the noise, at most 128.
    progress: told (stage, done, total) from the caller's thread.
    Raises what `plan_extraction` raises; Refused (code "no-difference") where nothing differs,
    "nonfinite" for damaged tensors; and what writing raises.
    """
    options = options or ExtractOptions()
    rule = _bounded(rule)
    if options.alpha is not None and not (math.isfinite(options.alpha) and options.alpha > 0):
        raise UsageError(
            f"an alpha of {options.alpha:g} makes no adapter",
            hint="alpha is a number above 0; by default it is the rank, and the scale 1",
        )
    with ExitStack() as opened:
        pairing = _paired(tuned, base, options, opened)
        _require_others(pairing, output)
        with located(pairing.tuned.store.label):
            found = _extracted(pairing, rule, options, progress)
        if output is None:
            # Tensors in memory do not need the checkpoint any more.
            adapter = replace(found.plan.adapter, store=None)
            return replace(found, plan=replace(found.plan, adapter=adapter))
        writing = ConvertOptions(verify=options.verify, force=options.force)
        found = replace(found, conversion=write_plan(found.plan, Path(output), writing))
        return replace(found, proof=_proof(found, Path(output), options))


def _bounded(rule: RankRule | None) -> RankRule:
    """The rule, `auto` where it names nothing to keep, with a highest rank."""
    rule = rule or RankRule(auto=True)
    if rule.rank is None and not rule.auto and rule.energy is rule.error is rule.size is None:
        rule = replace(rule, auto=True)
    return rule if rule.highest is not None else replace(rule, most=max(HIGHEST, rule.least))


def _paired(tuned: Model, base: Model, options: ExtractOptions, opened: ExitStack) -> Pairing:
    one = _opened(tuned, options.family, opened)
    two = _opened(base, options.family, opened)
    target = one.family.target(options.to or default_target(one.family))
    return pair(one, two, target, only=options.only, exclude=options.exclude)


def _opened(model: Model, family: str | None, opened: ExitStack) -> Checkpoint:
    found = open_checkpoint(model, family)
    if isinstance(model, str | Path):
        opened.enter_context(found)
    return found


def _require_others(pairing: Pairing, output: str | Path | None) -> None:
    """StoreError if the output is one of the models, by whatever name."""
    for model in (pairing.tuned, pairing.base):
        path = model.store.path
        if output is not None and path is not None and Path(output).exists() and Path(output).samefile(path):
            raise StoreError(
                f"{shown(output)}: is one of the models itself", code="exists", hint="choose another name"
            )


def _extracted(
    pairing: Pairing, rule: RankRule, options: ExtractOptions, progress: Progress | None
) -> Extraction:
    dtype = _dtype(pairing, options.dtype)
    settings = Settings(
        rule=rule,
        whole=options.full_small,
        embeddings=options.embeddings,
        exact=options.exact,
        seed=options.seed,
        device=device_of(options.device),
        dtype=dtype,
        allow=options.allow,
    )
    found = compare(pairing, settings, progress)
    _require_difference(found, settings)
    parts = {one.line.place: _part(one, options, dtype) for one in found if one.decomposition is not None}
    plan, reduction = _planned(pairing, found, parts, rule, options, dtype)
    lost = {source.place for source in plan.lost}
    outcomes = tuple(_outcome(one, reduction, one.line.place in lost) for one in found)
    result = Extraction(pairing, outcomes, plan, reduction, rule, suspicious(found))
    adapter = replace(plan.adapter, receipt=_receipt(result.tensors))
    return replace(result, plan=replace(plan, adapter=adapter, receipt=adapter.receipt))


def _require_difference(found: Sequence[Found], settings: Settings) -> None:
    """Refused if an adapter would have nothing to say."""
    if not any(one.energy for one in found):
        raise Refused(
            f"nothing differs in {len(found)} tensors: there is no adapter to extract",
            code="no-difference",
            hint="both are the same model, perhaps under two names",
        )
    wanted = [one for one in found if one.energy and settings.takes(one.line) in ("factors", "whole")]
    if not wanted:
        forms = ", ".join(dict.fromkeys(one.line.form for one in found if one.energy))
        raise Refused(
            f"nothing differs but tensors that were not asked for ({forms})",
            code="no-difference",
            hint="--full-small keeps norms and biases, --embeddings takes embeddings and output layers",
        )
    if all(one.decomposition is not None and one.decomposition.values[0] <= one.noise for one in wanted):
        raise Refused(
            "what differs is no more than the rounding of the weights: there is no adapter to extract",
            code="no-difference",
            hint="the models are the same in two dtypes; --rank N extracts the rounding all the same",
        )


def _dtype(pairing: Pairing, name: str | None) -> torch.dtype:
    """The dtype of the factors: as asked for, else that of most of the tuned weights."""
    if name is not None:
        if name not in _DTYPES:
            raise UsageError(f"there is no dtype `{name}`", hint=f"dtypes: {', '.join(_DTYPES)}")
        return torch_dtype(_DTYPES[name])
    tensors = pairing.tuned.store.tensors
    counts: Counter[str] = Counter()
    for line in pairing.lines:
        counts[tensors[line.keys[0]].dtype] += line.elements
    most = counts.most_common(1)[0][0]
    return torch_dtype({"F32": "F32", "F64": "F32", "BF16": "BF16"}.get(most, "F16"))


def _part(found: Found, options: ExtractOptions, dtype: torch.dtype) -> Part:
    line = found.line
    assert found.decomposition is not None
    return Part(
        found.decomposition,
        (max(line.tall, line.shape[0]), *line.shape[1:]),
        embedding=line.form == "embedding",
        noise=found.noise,
        dtype=dtype,
        alpha=options.alpha,
    )


def _planned(
    pairing: Pairing,
    found: Sequence[Found],
    parts: Mapping[Place, Part],
    rule: RankRule,
    options: ExtractOptions,
    dtype: torch.dtype,
) -> tuple[Plan, Reduction]:
    adapter = Adapter(
        family=pairing.tuned.family,
        changes={one.line.place: (_whole(one, pairing, dtype),) for one in found if one.whole is not None},
        metadata=_metadata(pairing.tuned.family, pairing.target),
        receipt=Receipt(0, 0, 0, {}),
        natives={one.line.place: one.line.native for one in found},
        tuners=_tuners(pairing),
        layouts=(pairing.target.layout,),
        store=pairing.tuned.store,
        computed=True,
    )
    writing = Options(allow=frozenset(options.allow))
    return fitted(
        adapter,
        parts,
        rule,
        pairing.target,
        writing,
        operation="extract",
        facts=_facts(pairing, options),
        natives=adapter.natives,
    )


def _whole(found: Found, pairing: Pairing, dtype: torch.dtype) -> Change:
    """A tensor that is kept as it is: its difference, or the tuned one itself where only that can be said."""
    assert found.whole is not None
    place, layout = found.line.place, layouts()[pairing.target.layout]
    param = place.param or "weight"
    says = layout.spelling("diff", "value", param, place.component, of_norm=len(found.line.shape) < 2)
    if says is not None and not says.scaled:
        return Whole(found.whole.to(dtype))
    tensor = pairing.tuned.tensor(place.component, place.span, place.param)
    assert tensor is not None
    return Whole(tensor.clone(), replaces=True)


def _metadata(family: Family, target: Target) -> dict[str, str]:
    """kohya's words for what the adapter is; ranks and alphas are filled in when they are known."""
    if target.scale != "alpha":
        return {}
    base = family.evidence.get("ss_base_model_version", ())
    return {
        "ss_network_module": "networks.lora",
        "ss_network_dim": "",
        "ss_network_alpha": "",
        **({"ss_base_model_version": base[0]} if base else {}),
    }


def _facts(pairing: Pairing, options: ExtractOptions) -> dict[str, Json]:
    """From what and how, for the metadata."""
    facts: dict[str, Json] = {"tuned": _name(pairing.tuned), "base": _name(pairing.base)}
    if options.alpha is not None:
        facts["alpha"] = options.alpha
    for name in ("full_small", "embeddings", "exact"):
        if getattr(options, name):
            facts[name] = True
    for name in ("only", "exclude"):
        if getattr(options, name):
            facts[name] = list(getattr(options, name))
    return facts


def _name(model: Checkpoint) -> str:
    return model.store.path.resolve().name if model.store.path is not None else "in memory"


def _tuners(pairing: Pairing) -> dict[str, TunerConfig]:
    """What PEFT's configuration says of the base, where a folder of it says so itself."""
    config = pairing.base.store.sidecars.get(CONFIG)
    values: dict[str, Json] = {}
    if isinstance(config, dict):
        values["base_model_name_or_path"] = config.get("_name_or_path") or None
        named = config.get("architectures")
        first = str(named[0]) if isinstance(named, list) and named else ""
        values["task_type"] = next((task for end, task in _TASKS.items() if first.endswith(end)), None)
    turned = [each for each in pairing.tuned.held.values() if each.row.span[0].transposed]
    if turned and pairing.tuned.family.open:
        values["fan_in_fan_out"] = True
    return {"": TunerConfig(values)} if values else {}


# peft v0.21.2 utils/peft_types.py: TaskType; the ends are those of transformers' classes.
_TASKS = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}


def _outcome(found: Found, reduction: Reduction, lost: bool) -> Outcome:
    place, line = found.line.place, found.line
    if not found.energy:
        return Outcome(line, "unchanged", 0, 0.0, 0.0, 0.0)
    if not math.isfinite(found.energy):
        return Outcome(line, "nonfinite", 0, found.change, found.energy, found.energy)
    if lost:
        return Outcome(line, "untranslatable", 0, found.change, found.energy, found.energy)
    if found.whole is not None:
        return Outcome(line, "whole", 0, found.change, found.energy, 0.0)
    rank = reduction.ranks.get(place, 0)
    if rank and found.decomposition is not None:
        left = found.decomposition.left_out(rank)
        return Outcome(line, "extracted", rank, found.change, found.energy, left)
    what = "noise" if found.decomposition is not None else line.form
    return Outcome(line, what, 0, found.change, found.energy, found.energy)


def _proof(found: Extraction, output: Path, options: ExtractOptions) -> Proof | None:
    """Compare the written file with the difference itself, on some modules or on all."""
    extracted = [outcome for outcome in found.outcomes if outcome.what == "extracted"]
    if options.verify == "none" or not extracted:
        return None
    step = max(1, len(extracted) // _SAMPLE) if options.verify == "sample" else 1
    sample = extracted[::step]
    written = load(output, family=found.pairing.tuned.family.key, allow=options.allow)
    pairs = [(o, written.changes[o.line.place]) for o in sample if o.line.place in written.changes]
    if not pairs:
        return None
    energy = math.fsum(outcome.energy for outcome, _ in pairs)
    left = math.fsum(remaining(found.pairing, outcome.line, changes[0]) for outcome, changes in pairs)
    predicted = math.fsum(outcome.left for outcome, _ in pairs)
    return Proof(len(pairs), math.sqrt(left / energy), math.sqrt(predicted / energy))


def _receipt(tensors: Mapping[str, str]) -> Receipt:
    """The sum of all tensors of the tuned model."""
    dropped = {key: what for key, what in tensors.items() if what not in OUTCOMES}
    return Receipt(len(tensors), len(tensors) - len(dropped), 0, dropped)
