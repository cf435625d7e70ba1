"""Files as real libraries wrote them: recognised for what they are, read in full, converted or refused.

What a manifest is stands in its first line; what each format cannot say of it stands below.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import torch
from adapters import File, converted
from manifests import Manifest, manifests, materialise, read_manifest

from adapterkit.adapter import read_adapter
from adapterkit.detect import Explanation, explain
from adapterkit.errors import Unrepresentable, Untranslatable
from adapterkit.operations.convert import ConvertOptions, convert
from adapterkit.specs.families import Family, family
from adapterkit.specs.layouts import layouts

# "writer: …; model: …" of the first line -> the layout, and the family that it is.
LAYOUTS = {
    "diffusers 0.42.1 save_lora_weights": "diffusers",
    "LyCORIS 4.1.3 kohya network": "kohya",
    "PEFT 0.21.2": "peft",
}
FAMILIES = {
    "sd15": "sd1",
    "sdxl": "sdxl",
    "sd3": "SD 3 medium",
    "flux": "flux1",
    # The 40 modules of this file are named in FLUX.1 as well, and have the same shapes there.
    "flux2-klein": "flux1",
    # No tables yet: their names pass as they are.
    **dict.fromkeys(
        ("hunyuan-video", "krea2", "ltxv", "lumina2", "qwen-image", "wan", "z-image"), "diffusers"
    ),
    **{f"llm:{name}": "transformers" for name in ("bert", "gpt2", "llama", "llama-tied", "mixtral", "qwen3")},
}
# Files whose tensors would fit Stable Diffusion 2 as well: none of them touches the text or proj_in, or
# their shapes do not tell the weight's.
AS_WELL = {
    "diffusers_sd15_convonly",
    "lycoris_sd15_boft",
    "lycoris_sd15_ia3",
    "lycoris_sd15_loha",
    "lycoris_sd15_loha-dora",
    "lycoris_sd15_loha-tucker",
    "lycoris_sd15_oft",
    "lycoris_sd15_oft-constraint",
    "lycoris_sd15_oft-rescaled",
    "lycoris_sd15_tlora",
}

# What a format has no words for, by its target's name.
BEYOND_LORA = {
    *(f"lycoris_sd15_{name}" for name in ("boft", "full", "glora", "ia3", "norm", "tlora", "dora-in")),
    *(f"lycoris_sd15_{name}" for name in ("oft", "oft-constraint", "oft-rescaled", "locon-tucker")),
    *(f"lycoris_sd15_{name}" for name in ("loha", "loha-dora", "loha-tucker")),
    *(f"lycoris_sd15_{name}" for name in ("lokr", "lokr-both", "lokr-dora", "lokr-full", "lokr-tucker")),
}
# PEFT has these two, but divides the few channels of a reduced model in another way.
IN_PEFT = {"lycoris_sd15_loha", "lycoris_sd15_loha-tucker", "lycoris_sd15_ia3"}
REFUSED: dict[str, set[str]] = {
    "diffusers": BEYOND_LORA,
    "diffusers-2023": BEYOND_LORA | {"lycoris_sd15_dora-out", "diffusers_sd15_dora", "diffusers_sdxl_dora"},
    "peft": BEYOND_LORA - IN_PEFT,
    "bfl": {"diffusers_flux_dora", "diffusers_flux_meta"},
    "xlabs": {"diffusers_flux_dora", "diffusers_flux_meta", "diffusers_flux_bias"},
}
# In a file of a few modules a fused weight lacks members and with them their magnitudes; in a whole one
# there are modules that XLabs has no name for.
REFUSED_IN_PART = {("diffusers_flux_dora", "kohya"), ("diffusers_flux_dora", "comfyui")}
REFUSED_AS_A_WHOLE = {("diffusers_flux_pattern", "xlabs")}


def expected(manifest: Manifest) -> tuple[str, str]:
    """(family, layout) by the first line."""
    writer, _, model = manifest.header.removeprefix("writer: ").partition("; model: ")
    return FAMILIES[model.removesuffix(" (reduced width)")], LAYOUTS[writer]


def header_of(manifest: Manifest) -> File:
    """The file without weights: every tensor is one number, expanded."""
    zeros = {t.name: torch.zeros(()).expand(t.shape) for t in manifest.tensors}
    return File(zeros, manifest.metadata, manifest.sidecars)


def explained(name: str) -> Explanation:
    return explain(header_of(read_manifest(name)).store())


NAMES = [path.stem for path in manifests()]


@pytest.mark.parametrize("name", NAMES)
def test_a_manifest_is_explained_in_full_by_its_family_and_layout(name: str) -> None:
    found = explained(name)
    assert (found.family.key, found.layouts) == (
        expected(read_manifest(name))[0],
        (expected(read_manifest(name))[1],),
    )
    assert found.share == 1.0 and found.unclaimed == () and found.incomplete == ()
    assert [other.family.name for other in found.equals] == (["sd2"] if name in AS_WELL else [])


@cache
def few_modules(name: str, most: int) -> Manifest:
    """The manifest with `most` of its modules, spread evenly, and all tensors of each."""
    manifest = read_manifest(name)
    layout = layouts()[expected(manifest)[1]]
    modules: dict[str, list[str]] = defaultdict(list)
    for tensor in manifest.tensors:
        parted = layout.split(tensor.name)
        modules[parted[0] if parted else tensor.name].append(tensor.name)
    step = -(-len(modules) // most)
    kept = {key for keys in list(modules.values())[::step] for key in keys}
    kept |= {key for stem, keys in modules.items() if stem == keys[0] for key in keys}
    tensors = tuple(tensor for tensor in manifest.tensors if tensor.name in kept)
    return Manifest(manifest.name, manifest.header, manifest.metadata, manifest.sidecars, tensors)


@cache
def weights_of(name: str, most: int) -> File:
    manifest = few_modules(name, most)
    return File(materialise(manifest), manifest.metadata, manifest.sidecars)


@pytest.mark.parametrize("name", NAMES)
def test_every_tensor_of_a_manifest_is_in_the_adapter(name: str) -> None:
    store = weights_of(name, 40).store()
    adapter = read_adapter(store, explain(store, family_name=expected(read_manifest(name))[0]))
    assert adapter.receipt.balances and not adapter.receipt.dropped
    assert adapter.receipt.mapped + adapter.receipt.carried == len(store.tensors)


@pytest.mark.parametrize("name", NAMES)
def test_a_file_written_in_its_own_format_has_the_same_tensors(name: str) -> None:
    before = weights_of(name, 12)
    after = converted(before, *expected(read_manifest(name)))
    # Newer encoders lack the outer module; files are written with the name that all readers know.
    new, classic = "text_encoder.encoder.", "text_encoder.text_model.encoder."
    spelled = {key.replace(new, classic): key for key in before.tensors}
    assert after.tensors.keys() == spelled.keys()
    for key, old in spelled.items():
        one, two = after.tensors[key], before.tensors[old]
        if name == "lycoris_sd15_dylora":
            # It keeps the factors of convolutions as matrices; they are written with the layer's axes.
            one = one.reshape(two.shape)
        assert torch.equal(one, two) if one.ndim else float(one) == float(two), key


def distinct_targets(owner: Family) -> Iterator[str]:
    seen = set()
    for name in owner.target_names():
        target = owner.target(name)
        key = (
            target.layout,
            target.scale,
            *sorted((c, p.text, p.naming) for c, p in target.prefixes.items()),
        )
        if key not in seen:
            seen.add(key)
            yield name


CONVERSIONS = [
    (name, to) for name in NAMES for to in distinct_targets(family(expected(read_manifest(name))[0])[0])
]


@pytest.mark.parametrize("name, to", CONVERSIONS)
def test_a_manifest_is_converted_and_proven_or_refused_with_what_to_do(
    name: str, to: str, tmp_path: Path
) -> None:
    check_conversion(name, to, tmp_path, weights_of(name, 8), REFUSED_IN_PART)


@pytest.mark.slow
@pytest.mark.parametrize("name, to", CONVERSIONS)
def test_a_whole_manifest_is_converted_and_proven_or_refused(name: str, to: str, tmp_path: Path) -> None:
    check_conversion(name, to, tmp_path, weights_of(name, 10_000), REFUSED_AS_A_WHOLE)


def check_conversion(name: str, to: str, folder: Path, file: File, refused_too: set[tuple[str, str]]) -> None:
    options = ConvertOptions(verify="full", family=expected(read_manifest(name))[0])
    if name in REFUSED.get(to, ()) or (name, to) in refused_too:
        with pytest.raises((Unrepresentable, Untranslatable)) as caught:
            convert(file.store(), to, folder / "out", options)
        assert caught.value.hint
        assert not (folder / "out").is_file()
        return
    done = convert(file.store(), to, folder / "out", options)
    assert done.receipt.balances and not done.receipt.dropped
    assert done.verification is not None
    assert done.verification.compared == done.verification.modules > 0
    # PEFT stores 1 + w of an IA³'s w, which is some hundredths.
    assert done.verification.error <= (1e-5 if name == "lycoris_sd15_ia3" else 1e-6)
