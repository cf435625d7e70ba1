"""convert: the same change, spelled for another program."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import isfinite
from pathlib import Path
from typing import Literal

from adapterkit.adapter import Adapter, Receipt, read_adapter
from adapterkit.compare import Difference, differences, units
from adapterkit.detect import explain
from adapterkit.errors import Json, Mismatch, Refused, StoreError, UsageError, VerificationFailed, located
from adapterkit.metadata import output_metadata
from adapterkit.operations.sources import Source
from adapterkit.operations.sources import open as open_source
from adapterkit.peft_config import component_config
from adapterkit.plan import Options, Plan, is_finite, make_plan
from adapterkit.scale import ScaleFrom
from adapterkit.specs.tuner_config import CONFIG_FILE
from adapterkit.stores import (
    Store,
    Written,
    filling,
    open_store,
    torch_dtype,
    write_json,
    write_safetensors,
)
from adapterkit.stores.guards import shown
from adapterkit.stores.joined import JoinedStore

Verify = Literal["none", "sample", "full"]

_SAMPLE = 32
# Twice what rounding both factors of a product can make of it.
_ROUNDING = {"F64": 2.0**-16, "F32": 2.0**-16, "F16": 2.0**-9, "BF16": 2.0**-6}
# What float32 arithmetic of the comparison itself can make of two exact forms of one change.
_EXACT = 2.0**-20
_DTYPES = {"fp32": "F32", "fp16": "F16", "bf16": "BF16"}


@dataclass(frozen=True)
class Verification:
    """What reading the output back showed: how many modules were compared, and the worst of them."""

    compared: int
    modules: int
    worst: Difference | None

    @property
    def error(self) -> float:
        return self.worst.error if self.worst else 0.0


@dataclass(frozen=True)
class Conversion:
    """The outcome of `convert`: what was planned, and, unless nothing was to be written, the files."""

    plan: Plan
    files: tuple[Path, ...] = ()
    written: tuple[Written, ...] = ()
    verification: Verification | None = None

    @property
    def receipt(self) -> Receipt:
        return self.plan.receipt


@dataclass(frozen=True)
class ConvertOptions:
    """How to convert; every field has a command-line option of its name.

    dtype: "fp32", "fp16" or "bf16" for the written factors; None keeps what they are.
    as_lora: expand every kind that has an exact low-rank form.
    fold: put the scale into the factors even where the target has a place for it.
    family, scale_from, allow: see `load`; allow also takes "untranslatable", "passengers",
    "magnitude" and "nonfinite".
    verify: read the output back and compare "none", a "sample" of about 32, or all modules.
    """

    dtype: str | None = None
    as_lora: bool = False
    fold: bool = False
    family: str | None = None
    scale_from: ScaleFrom | None = None
    allow: Collection[str] = field(default_factory=frozenset)
    verify: Verify = "sample"
    force: bool = False


def plan_conversion(source: Source, to: str, options: ConvertOptions | None = None) -> Plan:
    """What `convert` would write, with every error that it would raise before writing.

    Raises what `load` and `make_plan` raise, and UsageError for a format that the family has not.
    """
    options = options or ConvertOptions()
    opened = open_source(source, family=options.family)
    with located(opened.store.label):
        target = opened.explanation.family.target(to)
        opened.explanation.decided(opened.store.label, to)
        adapter = opened.load(allow=options.allow, scale_from=options.scale_from)
        plan = make_plan(adapter, target, plan_options(options))
        # What cannot stand in the metadata or the configuration is refused here as well.
        output_metadata(plan)
        _configs(plan)
    return plan


def plan_options(options: ConvertOptions) -> Options:
    """What of the options concerns the plan. UsageError for an unknown dtype."""
    dtype = None
    if options.dtype is not None:
        if options.dtype not in _DTYPES:
            raise UsageError(f"there is no dtype `{options.dtype}`", hint=f"dtypes: {', '.join(_DTYPES)}")
        dtype = torch_dtype(_DTYPES[options.dtype])
    return Options(dtype, options.as_lora, frozenset(options.allow), options.fold)


def convert(source: Source, to: str, output: str | Path, options: ConvertOptions | None = None) -> Conversion:
    """Write `source` in the format `to`.

    output: a file, or a folder for formats that are folders (PEFT).
    Nothing is written unless everything can be; the output is read back and compared before it
    takes its name. Raises VerificationFailed if that shows another change, and what
    `plan_conversion` and the writer raise.
    """
    options = options or ConvertOptions()
    plan = plan_conversion(source, to, options)
    return write_plan(plan, Path(output), options)


def save(adapter: Adapter, to: str, output: str | Path, options: ConvertOptions | None = None) -> Conversion:
    """Write an adapter in memory in the format `to`; see `convert`.

    The options that concern reading (family, scale_from) have no effect.
    """
    options = options or ConvertOptions()
    plan = make_plan(adapter, adapter.family.target(to), plan_options(options))
    return write_plan(plan, Path(output), options)


def write_plan(plan: Plan, output: Path, options: ConvertOptions) -> Conversion:
    """Write a plan's file, or its folder, or one folder per component: all of it or nothing."""
    source = plan.adapter.store
    if source is not None and not options.force:
        _require_another(source, output)
    write = _write_folder if plan.layout.folder else _write_file
    try:
        return write(plan, output, options)
    except (Refused, Mismatch, VerificationFailed) as error:
        # Errors of the store name the output already.
        error.at(source.label if source is not None else "in memory")
        raise


def _require_another(source: Store, output: Path) -> None:
    """StoreError if the output is the input, by whatever name."""
    try:
        same = source.path is not None and output.samefile(source.path)
    except (OSError, ValueError):
        return
    if same:
        raise StoreError(
            f"{shown(output)}: is the input itself",
            code="exists",
            hint="choose another name; --force writes the result in its place",
        )


def _write_file(plan: Plan, output: Path, options: ConvertOptions) -> Conversion:
    written, verification = _write(plan, None, output, options)
    return Conversion(plan, (output,), (written,), verification)


def _write_folder(plan: Plan, output: Path, options: ConvertOptions) -> Conversion:
    configs = _configs(plan)
    fronts = {component: f"{component}/" if len(configs) > 1 else "" for component in configs}
    names = [front + name for front in fronts.values() for name in (plan.layout.folder, CONFIG_FILE)]
    outcomes: list[tuple[Written, Verification | None]] = []
    with filling(output, names, overwrite=options.force) as folder:
        for component, config in configs.items():
            path = folder / fronts[component] / plan.layout.folder
            path.parent.mkdir(exist_ok=True)
            outcomes.append(_write(plan, component, path, options, config))
            write_json(path.with_name(CONFIG_FILE), config)
    verifications = [verification for _, verification in outcomes if verification]
    return Conversion(
        plan,
        tuple(output / name for name in names),
        tuple(written for written, _ in outcomes),
        _together(verifications),
    )


def _configs(plan: Plan) -> dict[str, dict[str, Json]]:
    """The configuration beside each component's tensors, for formats that are folders."""
    return {name: component_config(plan, name) for name in plan.components} if plan.layout.folder else {}


def _together(found: Sequence[Verification]) -> Verification | None:
    """What several files showed, as one."""
    worst = max(
        (one.worst for one in found if one.worst), key=lambda difference: difference.error, default=None
    )
    compared, modules = sum(one.compared for one in found), sum(one.modules for one in found)
    return Verification(compared, modules, worst) if found else None


def _write(
    plan: Plan,
    component: str | None,
    path: Path,
    options: ConvertOptions,
    config: Mapping[str, Json] | None = None,
) -> tuple[Written, Verification | None]:
    infos = plan.header(component)
    found: list[Verification] = []

    def check(temporary: Path) -> None:
        found.append(verify(plan, temporary, component, options.verify, config))

    written = write_safetensors(
        path,
        infos,
        plan.tensors(infos, component),
        output_metadata(plan),
        overwrite=options.force,
        check=check if options.verify != "none" else None,
    )
    return written, found[0] if found else None


def verify(
    plan: Plan, path: Path, component: str | None, how: Verify, config: Mapping[str, Json] | None = None
) -> Verification:
    """Read a written file back and compare its changes with those that were asked for.

    Raises VerificationFailed if they differ by more than the rounding that was asked for, and
    Refused if that rounding itself loses too much.
    """
    with open_store(path) as store:
        if config is not None:
            store.sidecars = {CONFIG_FILE: dict(config)}
        named = _named(store, path, component, plan)
        explanation = explain(named, family_name=plan.adapter.family.key)
        found = read_adapter(named, explanation, allow=plan.options.allow)
        expected = _only(plan.expected, component)
        sample = _SAMPLE if how == "sample" else None
        compared = list(differences(expected, found, sample=sample))
        if "nonfinite" in plan.options.allow:
            unsound = _unsound(expected) | _unsound(found)
            compared = [one for one in compared if (one.component, one.module) not in unsound]
    worst = max(compared, key=lambda difference: difference.error, default=None)
    _judge(plan, worst)
    return Verification(len(compared), len(units(expected, found)), worst)


def _unsound(adapter: Adapter) -> set[tuple[str, str]]:
    """Modules with numbers that are not finite, by component and name: nothing can be compared with them."""
    found: set[tuple[str, str]] = set()
    for place, changes in adapter.changes.items():
        if not all(is_finite(tensor) for change in changes for tensor in change.tensors().values()):
            modules = dict.fromkeys(piece.module for piece in place.span)
            found.update((place.component, name) for name in (*modules, " + ".join(modules)))
    return found


def _named(store: Store, path: Path, component: str | None, plan: Plan) -> Store:
    """The store, with the component's name before its keys where the family's folders are named so.

    A folder alone does not tell one text encoder from another.
    """
    front = f"{component}/"
    prefixes = plan.adapter.family.spelling[plan.target.layout]
    if component is None or not any(prefix.text.startswith(front) for prefix in prefixes):
        return store
    return JoinedStore(path.parent, {component: store})


def _only(adapter: Adapter, component: str | None) -> Adapter:
    if component is None:
        return adapter
    changes = {place: c for place, c in adapter.changes.items() if place.component == component}
    return replace(adapter, changes=changes)


def _judge(plan: Plan, worst: Difference | None) -> None:
    if worst is None or worst.error <= _tolerance(plan):
        return
    facts: dict[str, Json] = {"module": worst.name, "error": worst.error}
    # A dtype can round a change away, but neither make one nor leave one out.
    if plan.options.dtype is not None and isfinite(worst.error):
        if "precision" in plan.options.allow:
            return
        raise Refused(
            f"in the requested dtype `{worst.name}` loses {worst.error:.1%} of its change",
            code="precision",
            hint="its numbers are too small or too large; --dtype bf16 or fp32 keeps them, "
            "--allow precision writes it all the same",
            details=facts,
        )
    raise VerificationFailed(
        f"`{worst.name}` read back differs by {worst.error:.3g} from what was asked for",
        hint="this is a fault of adapterkit; please report it with the file's `inspect --json`",
        details=facts,
    )


def _tolerance(plan: Plan) -> float:
    """The relative error that rounding once to the written dtypes can make."""
    rounds = plan.rounded or plan.options.dtype is not None or plan.options.as_lora
    if not rounds and all(module.cut.renames for module in plan.modules):
        return _EXACT
    dtypes = {info.dtype for module in plan.modules for info in module.tensors.values() if info.shape}
    return max((_ROUNDING.get(dtype, 2.0**-2) for dtype in dtypes), default=_ROUNDING["F32"])
