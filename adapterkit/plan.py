"""Planning: what will be written, settled before a byte is written.

A plan lists every output tensor with its shape, knows what each is made of, and makes it when the
writer asks: one tensor at a time, so that memory is bounded by the largest and not by the file.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from adapterkit.adapter import Adapter, Receipt, weight_shape
from adapterkit.deltas import Change, Magnitude
from adapterkit.errors import Json, Refused, Unrepresentable, Untranslatable
from adapterkit.recut import Cut, Preparation, Source, along, recut, sources_of
from adapterkit.specs.families import Target
from adapterkit.specs.layouts import Layout, layouts
from adapterkit.specs.tuner_config import ModuleScale
from adapterkit.spell import Site, spell
from adapterkit.stores import TensorInfo, canonical_order, dtype_name

# Kinds that change a layer's own tensors; every other stands in a layer around it.
_ON_THE_LAYER = frozenset({"set", "diff", "reshape", "tokens"})


@dataclass(frozen=True)
class Options:
    """What the user may decide about a conversion.

    dtype: of the written factors; None keeps each as it is.
    as_lora: expand every kind that has an exact low-rank form.
    allow: named consents to lose something ("untranslatable", "passengers", "nonfinite", …).
    fold: put the scale into the factors even where the target has a place for it.
    """

    dtype: torch.dtype | None = None
    as_lora: bool = False
    allow: frozenset[str] = frozenset()
    fold: bool = False


@dataclass(frozen=True)
class Module:
    """One module of the output: what it is made of and the tensors it becomes.

    path: its name in the target without prefix.  tensors: key -> (dtype, shape) as written.
    """

    component: str
    native: str
    path: str
    cut: Cut
    site: Site
    kind: str
    tensors: Mapping[str, TensorInfo]
    scale: ModuleScale | None
    exact: bool


@dataclass(frozen=True)
class Plan:
    """An adapter, a target, and everything that will be written.

    receipt: what becomes of every input tensor.  lost: changes left out by consent, and which.
    idle: modules left out because they are exactly zero beside parts that are not.
    rounded: modules whose scale could not be folded exactly.
    """

    adapter: Adapter
    target: Target
    options: Options
    modules: tuple[Module, ...]
    passengers: Mapping[str, Tensor]
    receipt: Receipt
    lost: Mapping[Source, str]
    idle: tuple[str, ...]

    @cached_property
    def expected(self) -> Adapter:
        """The input's own changes, as they were read, that the output must make: all but the lost."""
        bare = _bare(self.layout, self.options)
        lost = {(source.place, change) for source in self.lost for change in source.originals}
        kept = {
            place: tuple(_without(bare, change) for change in changes if (place, change) not in lost)
            for place, changes in self.adapter.changes.items()
        }
        return replace(self.adapter, changes={place: changes for place, changes in kept.items() if changes})

    @cached_property
    def rounded(self) -> tuple[str, ...]:
        return tuple(module.native for module in self.modules if not module.exact)

    @property
    def layout(self) -> Layout:
        return layouts()[self.target.layout]

    @property
    def components(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(module.component for module in self.modules))

    def header(self, component: str | None = None) -> list[TensorInfo]:
        """The tensors to be written, in the order of the file; of one component, or of all."""
        infos = [
            info
            for module in self.modules
            if component in (None, module.component)
            for info in module.tensors.values()
        ]
        if component in (None, self.components[0] if self.components else None):
            infos += [info_of(key, tensor) for key, tensor in self.passengers.items()]
        return canonical_order(infos)

    def tensors(
        self, infos: Sequence[TensorInfo], component: str | None = None
    ) -> Iterator[tuple[str, Tensor]]:
        """Make these tensors (of one component) one after another.

        Raises Refused for a number that is not finite, StoreError if the input was changed meanwhile.
        """
        modules = [module for module in self.modules if component in (None, module.component)]
        owner = {key: module for module in modules for key in module.tensors}
        made: tuple[Module | None, dict[str, Tensor]] = (None, {})
        for info in infos:
            module = owner.get(info.name)
            if module is None:
                yield info.name, self.passengers[info.name]
                continue
            if made[0] is not module:
                self._require_unchanged()
                made = (module, _tensors(module))
            yield info.name, self._checked(info.name, made[1][info.name], module)
        self._require_unchanged()

    def _require_unchanged(self) -> None:
        if self.adapter.store is not None:
            self.adapter.store.require_unchanged()

    def state_dict(self) -> dict[str, Tensor]:
        """All tensors at once, for a caller who keeps them in memory instead of a file."""
        return dict(self.tensors(self.header()))

    def _checked(self, key: str, tensor: Tensor, module: Module) -> Tensor:
        if "nonfinite" not in self.options.allow and not is_finite(tensor):
            places = [source.place for source in module.cut.sources]
            raise _not_finite(key, tensor, [self.adapter.natives.get(place, key) for place in places])
        return tensor


def _not_finite(key: str, tensor: Tensor, natives: Sequence[str]) -> Refused:
    bad = int((~torch.isfinite(tensor.to(torch.float32))).sum())
    return Refused(
        f"{' and '.join(f'`{name}`' for name in dict.fromkeys(natives))}: {bad} of {tensor.numel()} numbers "
        f"would not be finite in `{key}`, {dtype_name(tensor.dtype)}",
        code="nonfinite",
        hint="the adapter is damaged, or its numbers are too large for this dtype; "
        "--allow nonfinite writes them as they are",
        details={"key": key, "count": bad, "modules": list[Json](natives)},
    )


def is_finite(tensor: Tensor) -> bool:
    """Whether every number is finite: one that is not makes the sum so, and the sum is quick.

    Only a sum that overflows by itself needs the slower look at each number.
    """
    if not (tensor.is_floating_point() and tensor.numel()):
        return True
    if tensor.element_size() == 2:
        # Of half precision the extremes are found many times quicker than a sum, and pass on a NaN as well.
        return all(bool(extreme.isfinite()) for extreme in tensor.aminmax())
    total = tensor.sum(dtype=torch.float64 if tensor.dtype == torch.float64 else torch.float32)
    # torch has no `isfinite` for numbers of one byte.
    looked_at = tensor.to(torch.float32) if tensor.element_size() == 1 else tensor
    return bool(torch.isfinite(total)) or bool(torch.isfinite(looked_at).all())


def info_of(key: str, tensor: Tensor) -> TensorInfo:
    return TensorInfo(key, dtype_name(tensor.dtype), tuple(tensor.shape))


def _tensors(module: Module) -> dict[str, Tensor]:
    change = module.cut.make()
    assert change is not None
    return spell(change, module.site).tensors


def make_plan(adapter: Adapter, target: Target, options: Options | None = None) -> Plan:
    """Settle what `adapter` becomes in `target`.

    Raises Untranslatable for places the target has no name for, Unrepresentable for changes it has
    no form for, and Refused for passengers it does not know, unless the options allow it.
    """
    options = options or Options()
    planning = _Planning(adapter, target, options)
    for component in adapter.components:
        planning.add_component(component)
    passengers = planning.passengers()
    if not planning.modules:
        raise Refused(
            f"nothing of the adapter is left in {planning.layout.title}",
            code="nothing-left",
            hint="choose another format, or allow less to be left out",
        )
    return Plan(
        adapter=adapter,
        target=target,
        options=options,
        modules=tuple(planning.modules),
        passengers=passengers,
        receipt=planning.receipt(),
        lost=dict(planning.lost),
        idle=tuple(planning.idle),
    )


@dataclass
class _Planning:
    adapter: Adapter
    target: Target
    options: Options
    modules: list[Module] = field(default_factory=list)
    idle: list[str] = field(default_factory=list)
    lost: dict[Source, str] = field(default_factory=dict)
    dropped_passengers: list[str] = field(default_factory=list)
    taken: set[tuple[str, str]] = field(default_factory=set)

    @property
    def layout(self) -> Layout:
        return layouts()[self.target.layout]

    def add_component(self, component: str) -> None:
        preparation = Preparation(
            self.options.as_lora,
            _bare(self.layout, self.options),
            self.options.fold,
        )
        sources = [
            source
            for place, changes in self.adapter.changes.items()
            if place.component == component
            for source in sources_of(place, changes, preparation)
        ]
        prefix = self.target.prefixes.get(component)
        if prefix is None:
            self._nameless(sources, component)
            return
        self._require_meaning(component)
        found = recut(sources, self.adapter.family.names(component, prefix.naming))
        self._nameless(found.nameless, component)
        scales: dict[str, float] = {}
        wrapping = {cut.row.native for cut in found.cuts if cut.kind not in _ON_THE_LAYER}
        # Weights first: a bias that lies inside a layer is written relative to the layer's scale.
        for cut in sorted(found.cuts, key=lambda cut: cut.param == "bias"):
            wrapped = cut.row.native in wrapping or (cut.kind == "tokens" and bool(wrapping))
            self._add(cut, component, prefix.text, scales, wrapped)
        self._withdraw()

    def _withdraw(self) -> None:
        """Leave out the other modules that a lost change would be part of: it is lost as a whole."""
        while torn := [m for m in self.modules if not self.lost.keys().isdisjoint(m.cut.sources)]:
            self.modules = [module for module in self.modules if module not in torn]
            for module in torn:
                reason = next(self.lost[source] for source in module.cut.sources if source in self.lost)
                self.lost.update((s, reason) for s in module.cut.sources if s not in self.lost)

    def _require_meaning(self, component: str) -> None:
        """Refuse to part tensors from a configuration without which they mean another change."""
        config = self.adapter.tuners.get(component) or self.adapter.tuners.get("")
        if config is not None and config.needs_itself is not None and not self.layout.folder:
            raise Unrepresentable(
                f"the adapter depends on `{config.needs_itself}` of its configuration, which "
                f"{self.layout.title} cannot say",
                code="config-needed",
                hint="only PEFT applies it rightly: bake it there, or convert it to a plain LoRA there",
                details={"field": config.needs_itself},
            )

    def _nameless(self, sources: Sequence[Source], component: str) -> None:
        if not sources:
            return
        natives = [self.adapter.natives.get(s.place, s.place.span[0].module) for s in sources]
        if "untranslatable" not in self.options.allow:
            shown = ", ".join(f"`{name}`" for name in natives[:3]) + (", …" if len(natives) > 3 else "")
            raise Untranslatable(
                f"{self.layout.title} has no name for {len(natives)} modules of {component}: {shown}",
                hint="--allow untranslatable leaves them out; another format may keep them",
                details={"modules": list[Json](natives), "component": component},
            )
        self.lost.update((source, "untranslatable") for source in sources)

    def _add(self, cut: Cut, component: str, prefix: str, scales: dict[str, float], wrapped: bool) -> None:
        native = prefix + cut.row.native.replace(".", self.layout.dot)
        site = Site(
            layout=self.layout,
            component=component,
            native=native,
            param=cut.param if cut.row.param is None else "weight",
            scale_home=self.target.scale,
            of_norm=self._is_vector(cut, component),
            wrapped=wrapped,
            beside=scales.get(native),
            biased=self._has_bias(cut, component),
            kernel=self._kernel(cut, component),
            unused_alpha=self._alpha(cut),
            dtype=self.options.dtype,
            named=cut.row.param is not None,
        )
        try:
            change = cut.make()
            if change is None:
                self.idle.append(native)
                return
            spelled = spell(change, site)
        except Unrepresentable as error:
            if "untranslatable" in self.options.allow:
                self.lost.update((source, error.code) for source in cut.sources)
                return
            raise
        if spelled.scale is not None and spelled.kind == "lora":
            scales[native] = spelled.scale
        tensors = {key: info_of(key, tensor) for key, tensor in spelled.tensors.items()}
        self._require_free(tensors, native, component)
        scale = None
        if spelled.scale is not None:
            scale = ModuleScale(cut.row.native, spelled.rank or 0, spelled.scale)
        exact = spelled.exact and all(source.exact for source in cut.sources)
        self.modules.append(
            Module(component, native, cut.row.native, cut, site, spelled.kind, tensors, scale, exact)
        )

    def _alpha(self, cut: Cut) -> float:
        """The alpha that the file gives the first source of a cut, or 1."""
        found = self.adapter.scales.get(cut.sources[0].place) if cut.sources else None
        return found.alpha if found is not None and found.alpha is not None else 1.0

    def _has_bias(self, cut: Cut, component: str) -> bool:
        network = self.adapter.family.network(component)
        return network is not None and any(f"{piece.module}.bias" in network.shapes for piece in cut.row.span)

    def _kernel(self, cut: Cut, component: str) -> tuple[int, ...] | None:
        network = self.adapter.family.network(component)
        shape = network.weight_shape(cut.row.span[0].module) if network else None
        return shape[2:] if shape and len(shape) >= 2 else None

    def _is_vector(self, cut: Cut, component: str) -> bool:
        source = cut.sources[0]
        shape = weight_shape(self.adapter.family, replace(source.place, param="weight"))
        if shape is not None:
            return len(shape) == 1
        return cut.param == "weight" and len(source.original.shape) == 1

    def _require_free(self, keys: Collection[str], native: str, component: str) -> None:
        file = component if self.layout.folder else ""
        for key in keys:
            if (file, key) in self.taken:
                raise Unrepresentable(
                    f"`{native}`: two kinds of change would share the key `{key}`",
                    code="two-kinds",
                    hint="bake the adapter into its base"
                    if self.options.as_lora
                    else "--as lora expands them to one kind",
                    details={"key": key},
                )
            self.taken.add((file, key))

    def passengers(self) -> dict[str, Tensor]:
        """The passengers that the target knows; Refused for others unless their loss is allowed."""
        kept = {}
        for key, tensor in self.adapter.passengers.items():
            if self.layout.passenger(key) is not None:
                kept[key] = tensor
            else:
                self.dropped_passengers.append(key)
        if self.dropped_passengers and "passengers" not in self.options.allow:
            raise Refused(
                f"{self.layout.title} has no place for {len(self.dropped_passengers)} tensors that travel "
                f"with the adapter: `{self.dropped_passengers[0]}`, …",
                code="passengers",
                hint="--allow passengers leaves them out",
                details={"keys": list[Json](self.dropped_passengers)},
            )
        return kept

    def receipt(self) -> Receipt:
        """Every input tensor, sorted into mapped, carried and dropped."""
        read = self.adapter.receipt
        lost = self._lost_keys()
        lost |= dict.fromkeys(self.dropped_passengers, "passengers")
        return Receipt(
            total=read.total,
            mapped=read.mapped - (len(lost) - len(self.dropped_passengers)),
            carried=read.carried - len(self.dropped_passengers),
            dropped={**read.dropped, **lost},
        )

    def _lost_keys(self) -> dict[str, str]:
        """The tensors of lost changes, and the magnitudes of those that are written without."""
        reasons = {
            (source.place, change): reason
            for source, reason in self.lost.items()
            for change in source.originals
        }
        bare = _bare(self.layout, self.options)
        lost: dict[str, str] = {}
        for place, changes in self.adapter.changes.items():
            for change, keys in zip(changes, self.adapter.keys.get(place, ()), strict=False):
                if (reason := reasons.get((place, change))) is not None:
                    lost |= dict.fromkeys(keys.values(), reason)
                elif _without(bare, change) is not change and "magnitude" in keys:
                    lost[keys["magnitude"]] = "magnitude"
        return lost


def _without(bare: Collection[str], change: Change) -> Change:
    """The change without magnitudes that run along one of these."""
    return change.inner if isinstance(change, Magnitude) and along(change) in bare else change


def _bare(layout: Layout, options: Options) -> frozenset[str]:
    """What those magnitudes run along that the layout cannot write and whose loss is allowed."""
    if "magnitude" not in options.allow:
        return frozenset()
    spelling = layout.spelling("", "magnitude", "weight", "")
    if spelling is None:
        return frozenset({"out", "in", "embedding"})
    return frozenset() if spelling.axis == "by shape" else frozenset({"in"})
