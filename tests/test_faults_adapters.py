"""Files in order that are no adapters in order, through the front door."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import cast

import pytest
import torch
from front_door import (
    CONFIG,
    DOTTED,
    QKV,
    RANK,
    Fault,
    K,
    Q,
    Tensors,
    check_fault,
    config_of,
    diffusers,
    document,
    dora,
    fused,
    kohya,
    llama,
    loha,
    names,
    numbers,
    peft_folder,
    raw,
    run,
    saved,
    write,
)
from hostile import safetensors_bytes
from torch import Tensor

from adapterkit import inspect, load
from adapterkit.errors import Json, Mismatch, StoreError, VerificationFailed
from adapterkit.operations.convert import ConvertOptions, plan_conversion, write_plan
from adapterkit.specs.tuner_config import METADATA_KEY


def without(*keys: str) -> Tensors:
    return {key: tensor for key, tensor in kohya().items() if key not in keys}


def with_numbers(key: str, value: float, tensors: Tensors | None = None) -> Tensors:
    """One number of one tensor replaced."""
    tensors = tensors or kohya()
    tensors[key].view(-1)[7] = value
    return tensors


def fused_and_apart() -> Tensors:
    name = "transformer.transformer_blocks.0.attn.to_q"
    return fused() | {
        f"{name}.lora_A.weight": numbers(RANK, 3072),
        f"{name}.lora_B.weight": numbers(3072, RANK),
    }


def fused_loha() -> Tensors:
    """Over the weight of `fused`, by role."""
    shapes = {"w1_a": (9216, 2), "w1_b": (2, 3072), "w2_a": (9216, 2), "w2_b": (2, 3072)}
    return {role: numbers(*shape, seed=n) for n, (role, shape) in enumerate(shapes.items())}


PARTS = [
    Fault(
        "a down without its up",
        saved(without(f"{Q}.lora_up.weight")),
        "incomplete",
        ("2 of 8 tensors", f"`{Q}.alpha`", f"`{Q}.lora_down.weight`"),
        "--allow incomplete",
        exit_code=1,
        seen="incomplete",
    ),
    Fault(
        "an up without its down",
        saved(without(f"{Q}.lora_down.weight")),
        "incomplete",
        ("2 of 8 tensors", f"`{Q}.alpha`", f"`{Q}.lora_up.weight`"),
        "--allow incomplete",
        exit_code=1,
        seen="incomplete",
    ),
    Fault(
        "an alpha alone",
        saved(without(f"{Q}.lora_up.weight", f"{Q}.lora_down.weight")),
        "incomplete",
        ("1 of 7 tensors", f"`{Q}.alpha`"),
        "--allow incomplete",
        exit_code=1,
        seen="incomplete",
    ),
    Fault(
        "a tensor that nothing explains",
        saved(kohya() | names("odd.thing")),
        "unclaimed",
        ("1 of 10 tensors", "`odd.thing`"),
        "--allow unclaimed",
        exit_code=1,
        seen="unclaimed",
    ),
    Fault(
        "an embedding beside it",
        saved(kohya() | names("bundle_emb.x.string_to_param.*")),
        "passengers",
        ("`bundle_emb.x.string_to_param.*`",),
        "--allow passengers",
        exit_code=1,
        seen="fine",
    ),
    Fault(
        "factors of different ranks",
        saved(kohya() | {f"{Q}.lora_down.weight": torch.ones(8, 640)}),
        "mismatch",
        (f"`{Q}`", "640x4", "8x640", "ranks 4 and 8 differ"),
        seen="fine",
    ),
    Fault(
        "a rank of 0",
        saved(
            kohya() | {f"{Q}.lora_down.weight": torch.ones(0, 640), f"{Q}.lora_up.weight": torch.ones(640, 0)}
        ),
        "mismatch",
        (f"`{Q}`", "rank 0"),
        seen="mismatch",
    ),
    Fault(
        "a module under two names",
        saved(kohya(modules="q") | diffusers("q")),
        "duplicate-module",
        (f"`{Q}`", f"`{DOTTED}q`"),
        "remove one of the two",
        exit_code=1,
        seen="mixed",
    ),
    Fault(
        "a fused module and one of its parts",
        saved(fused_and_apart),
        "duplicate-module",
        (f"`{QKV}`", "`transformer.transformer_blocks.0.attn.to_q`"),
        "remove one of the two",
        exit_code=1,
        seen="mixed",
    ),
    Fault(
        "two adapters in one file",
        saved(llama("default") | llama("other")),
        "several-adapters",
        ("`default`, `other`",),
        "a file of its own",
        exit_code=1,
        seen="several-adapters",
        to="peft",
    ),
    Fault(
        "a kind that the format cannot say",
        saved(loha),
        "no-such-kind",
        (f"LoHa (`{DOTTED}q`",),
        "--as lora",
        exit_code=1,
        seen="fine",
    ),
    Fault(
        "magnitudes that the format cannot say",
        saved(dora),
        "no-magnitude",
        (f"`{DOTTED}q",),
        "--allow magnitude",
        exit_code=1,
        seen="fine",
        to="diffusers-2023",
    ),
    Fault(
        "a format that its model has not",
        saved(kohya),
        "unknown-target",
        ("`sdxl` cannot be written as `xlabs`",),
        "formats for Stable Diffusion XL",
        seen="fine",
        to="xlabs",
    ),
]

NUMBERS = [
    *(
        Fault(
            f"{value} in one module",
            saved(with_numbers(f"{K}.lora_up.weight", value)),
            "nonfinite",
            (f"`{K}`", "1 of 2560 numbers", f"`{DOTTED}k.lora_B.weight`"),
            "--allow nonfinite",
            exit_code=1,
            seen="fine",
        )
        for value in (float("nan"), float("inf"))
    ),
    Fault(
        "NaN in fp8",
        saved(with_numbers(f"{K}.lora_up.weight", float("nan"), kohya(dtype=torch.float8_e4m3fn))),
        "nonfinite",
        (f"`{K}`",),
        "--allow nonfinite",
        exit_code=1,
        seen="fine",
    ),
    Fault(
        "numbers too large for the dtype",
        saved(with_numbers(f"{K}.lora_up.weight", 1e6)),
        "nonfinite",
        (f"`{K}`", "F16"),
        "too large for this dtype",
        exit_code=1,
        seen="fine",
        options=("--dtype", "fp16"),
    ),
    Fault(
        "numbers too small for the dtype",
        saved({key: t * 1e-6 if t.ndim else t for key, t in kohya().items()}),
        "precision",
        ("in the requested dtype `unet.", "of its change"),
        "--dtype bf16 or fp32",
        exit_code=1,
        seen="fine",
        options=("--dtype", "fp16"),
    ),
    *(
        Fault(
            f"an alpha of {value}",
            saved(kohya() | {f"{Q}.alpha": torch.tensor(value)}),
            "bad-alpha",
            (f"`{Q}.alpha` is {value}",),
            seen="bad-alpha",
        )
        for value in (float("nan"), float("inf"))
    ),
    Fault(
        "an alpha of two numbers",
        saved(kohya() | {f"{Q}.alpha": torch.ones(2)}),
        "bad-alpha",
        (f"`{Q}.alpha` holds 2 numbers",),
        seen="bad-alpha",
    ),
    Fault(
        "an alpha of no number",
        saved(kohya() | {f"{Q}.alpha": torch.ones(0)}),
        "empty-tensor",
        (f"`{Q}.alpha` is empty",),
        seen="empty-tensor",
    ),
    Fault(
        "a complex alpha",
        saved(kohya() | {f"{Q}.alpha": torch.tensor(1j)}),
        "dtype",
        (f"`{Q}.alpha` is C64",),
        seen="dtype",
    ),
    Fault(
        "complex factors",
        saved(kohya(dtype=torch.complex64)),
        "dtype",
        ("lora_down.weight` is C64",),
        seen="fine",
    ),
    Fault(
        "factors of half a byte",
        raw(
            safetensors_bytes(
                {
                    f"{Q}.lora_down.weight": {"dtype": "F4", "shape": [4, 640], "data_offsets": [0, 1280]},
                    f"{Q}.lora_up.weight": {"dtype": "F4", "shape": [640, 4], "data_offsets": [1280, 2560]},
                },
                bytes(2560),
            )
        ),
        "dtype",
        (f"`{Q}`", "`F4`"),
        seen="fine",
    ),
]

SCALES = [
    Fault(
        "two scales",
        saved(diffusers() | {f"{DOTTED}q.alpha": torch.tensor(2.0)}, config_of()),
        "scale-conflict",
        (f"`{DOTTED}q`", "scale 0.5 from `.alpha`", "2 from lora_adapter_metadata"),
        "--scale-from",
        exit_code=1,
        seen="scale-conflict",
    ),
    Fault(
        "metadata of another rank",
        saved(diffusers(), config_of(r=16)),
        "rank-conflict",
        (f"`{DOTTED}k`", "rank 4", "says 16"),
        "correct the rank",
        exit_code=1,
        seen="rank-conflict",
    ),
    *(
        Fault(
            f"metadata {text}",
            saved(diffusers(), {METADATA_KEY: text}),
            "bad-config",
            (METADATA_KEY, says),
            seen="bad-config",
        )
        for text, says in [
            ('{"unet.r": 4', "not valid JSON"),
            ("[1]", "not a JSON object"),
            ("4", "not a JSON object"),
            ('{"a":' + "[" * 50_000, "nested too deeply"),
            ('{"unet.lora_alpha": 8, "unet.lora_alpha": 4}', "stands twice"),
            ('{"unet.lora_alpha": NaN}', "NaN is not JSON"),
            ('{"unet.lora_alpha": 1e999}', "not a finite number"),
            ('{"unet.r": "four"}', "not a whole number"),
            ('{"unet.alpha_pattern": {"((q+)+)+X": 3}}', "could take for ever"),
        ]
    ),
]


@pytest.mark.parametrize("fault", [*PARTS, *NUMBERS, *SCALES], ids=lambda fault: fault.name[:40])
def test_what_is_wrong_with_an_adapter_is_said(fault: Fault, tmp_path: Path) -> None:
    check_fault(fault, tmp_path)


def check_converts(source: Path, to: str, output: Path, *options: str) -> dict[str, Json]:
    """It converts, the receipt is even, and reading back has shown no difference; the document."""
    result = run("convert", source, "--to", to, "-o", output, *options, "--json")
    assert result.exit_code == 0, result.output
    (found,) = cast(list[dict[str, Json]], document(result)["results"])
    tensors = cast(dict[str, int], found["tensors"])
    dropped = cast(dict[str, str], tensors["dropped"])
    assert tensors["total"] == tensors["mapped"] + tensors["carried"] + len(dropped)
    return found


FINE: dict[str, tuple[Tensors, dict[str, str]]] = {
    "an up of zeros": ({k: t * ("up" not in k) for k, t in kohya().items()}, {}),
    "one up of zeros": (kohya() | {f"{Q}.lora_up.weight": torch.zeros(640, RANK)}, {}),
    "an integer alpha": (kohya(torch.tensor(2)), {}),
    "an alpha with an axis": (kohya(torch.tensor([2.0])), {}),
    "an alpha in bf16": (kohya(torch.tensor(2.0, dtype=torch.bfloat16)), {}),
    "a negative alpha": (kohya(-2.0), {}),
    "an alpha of 0": (kohya(0.0), {}),
    "a huge alpha": (kohya(1e38), {}),
    "another rank for each module": (
        kohya() | {f"{Q}.lora_down.weight": numbers(7, 640), f"{Q}.lora_up.weight": numbers(640, 7)},
        {},
    ),
    "a rank above the width": (
        kohya() | {f"{Q}.lora_down.weight": numbers(700, 640), f"{Q}.lora_up.weight": numbers(640, 700)},
        {},
    ),
    "two formats in one file": (kohya(modules="qk") | diffusers("v"), {}),
    "fp8, four bits of exponent": (kohya(dtype=torch.float8_e4m3fn), {}),
    "fp8, five bits of exponent": (kohya(dtype=torch.float8_e5m2), {}),
    "fp64": (kohya(dtype=torch.float64), {}),
    "fused fp8, which is cut": (
        {k: t.to(torch.float8_e4m3fn) if t.ndim else t for k, t in fused().items()},
        {},
    ),
    "metadata that is no JSON, where it does not matter": (
        kohya(),
        {"ss_network_args": "{", "ss_tag_frequency": "["},
    ),
}


@pytest.mark.parametrize("name", FINE)
def test_what_is_odd_but_right_is_converted(name: str, tmp_path: Path) -> None:
    tensors, metadata = FINE[name]
    source = write(tmp_path / "style.safetensors", tensors, metadata)
    found = check_converts(source, "diffusers", tmp_path / "new.safetensors", "--verify", "full")
    assert cast(dict[str, float], found["verification"])["error"] == 0
    check_converts(source, "diffusers", tmp_path / "cast.safetensors", "--dtype", "bf16")
    assert run("diff", source, tmp_path / "new.safetensors").exit_code == 0


CONSENTS = {
    "incomplete": (without(f"{Q}.lora_up.weight"), "diffusers", 2),
    "unclaimed": (kohya() | names("odd.thing"), "diffusers", 1),
    "passengers": (kohya() | names("bundle_emb.x"), "diffusers", 1),
    "untranslatable": (kohya(modules="k") | loha(), "diffusers", 4),
    "magnitude": (dora(), "diffusers-2023", 1),
    "nonfinite": (with_numbers(f"{Q}.lora_up.weight", float("inf")), "diffusers", 0),
}


@pytest.mark.parametrize("consent", CONSENTS)
def test_what_is_allowed_is_lost_and_nothing_else(consent: str, tmp_path: Path) -> None:
    tensors, to, lost = CONSENTS[consent]
    source = write(tmp_path / "style.safetensors", tensors)
    refused = run("convert", source, "--to", to, "-o", tmp_path / "new")
    assert refused.exit_code == 1
    found = check_converts(source, to, tmp_path / "new", "--allow", consent)
    dropped = cast(dict[str, dict[str, str]], found["tensors"])["dropped"]
    assert len(dropped) == lost


def test_of_two_kinds_for_one_weight_only_the_unsayable_one_is_lost(tmp_path: Path) -> None:
    source = write(tmp_path / "style.safetensors", kohya() | {f"{Q}.diff": numbers(640, 640)})
    found = check_converts(source, "diffusers", tmp_path / "new.safetensors", "--allow", "untranslatable")
    dropped = cast(dict[str, dict[str, str]], found["tensors"])["dropped"]
    assert dropped == {f"{Q}.diff": "no-such-kind"}
    kept = write(tmp_path / "kept.safetensors", kohya())
    assert run("diff", kept, tmp_path / "new.safetensors").exit_code == 0


@pytest.mark.parametrize("to", ["kohya", "diffusers"])
def test_two_kinds_that_become_one_add_up(to: str, tmp_path: Path) -> None:
    """On a fused weight, which one format keeps and the other cuts."""
    tensors = fused() | {f"{QKV}.hada_{role}": tensor for role, tensor in fused_loha().items()}
    source = write(tmp_path / "style.safetensors", tensors)
    check_converts(source, to, tmp_path / "new.safetensors", "--as", "lora")
    (low_rank, *_), (hadamard, *_) = (
        changes
        for part in (fused(), {k: t for k, t in tensors.items() if "hada" in k or "alpha" in k})
        for changes in load(part).changes.values()
    )
    expected = low_rank.dense() + hadamard.dense()
    made = load(tmp_path / "new.safetensors").changes
    found = {place.span[0].module[-1]: change.dense() for place, (change,) in made.items()}
    assert torch.allclose(torch.cat([found[side] for side in "qkv" if side in found]), expected, atol=1e-4)


def test_consent_to_rounding_does_not_cover_a_module_that_is_missing(tmp_path: Path) -> None:
    options = ConvertOptions(dtype="bf16", allow={"precision"}, verify="full")
    plan = plan_conversion(kohya(), "diffusers", options)
    torn = replace(plan, modules=plan.modules[1:])
    with pytest.raises(VerificationFailed):
        write_plan(torn, tmp_path / "new.safetensors", options)
    assert not list(tmp_path.iterdir())


def test_a_difference_is_seen_below_a_fused_change_of_the_same_rows(tmp_path: Path) -> None:
    source = write(tmp_path / "plain.safetensors", fused())
    check_converts(source, "diffusers", tmp_path / "cut.safetensors")
    extra = {"lora_transformer_transformer_blocks_0_attn_to_q.diff": numbers(3072, 3072)}
    more = write(tmp_path / "more.safetensors", fused() | extra)
    assert run("diff", source, tmp_path / "cut.safetensors").exit_code == 0
    assert run("diff", more, tmp_path / "cut.safetensors").exit_code == 1


def test_magnitudes_that_can_be_written_stay_though_their_loss_is_allowed(tmp_path: Path) -> None:
    name = "base_model.model.model.embed_tokens"
    tensors = {
        f"{name}.lora_embedding_A": numbers(RANK, 100),
        f"{name}.lora_embedding_B": numbers(64, RANK, seed=1),
        f"{name}.lora_magnitude_vector": numbers(64, seed=2),
    }
    config = {**CONFIG, "use_dora": True, "target_modules": ["embed_tokens"]}
    source = peft_folder(tmp_path / "in", config, tensors)
    found = check_converts(source, "peft", tmp_path / "out", "--allow", "magnitude")
    assert cast(dict[str, Json], found["tensors"])["dropped"] == {}


FLAT = {
    "LoKr of vectors": {f"{Q}.lokr_w1": numbers(4), f"{Q}.lokr_w2": numbers(3)},
    "LoKr of numbers": {f"{Q}.lokr_w1": torch.tensor(1.0), f"{Q}.lokr_w2": torch.tensor(2.0)},
    "GLoRA of numbers": {f"{Q}.{role}.weight": torch.tensor(1.0) for role in ("a1", "a2", "b1", "b2")},
    "VeRA over a number": {
        f"base_model.model.layers.0.mlp.down_proj.vera_lambda_{role}": numbers(4) for role in "bd"
    }
    | {"base_model.vera_A": torch.tensor(1.0), "base_model.vera_B": numbers(4, 4)},
}


@pytest.mark.parametrize("name", FLAT)
def test_factors_without_rows_and_columns_are_no_change(name: str) -> None:
    with pytest.raises(Mismatch, match="not a matrix"):
        load(FLAT[name])


@pytest.mark.parametrize("limit", [torch.tensor(float("nan")), numbers(3)])
def test_a_rotation_is_limited_by_one_number(limit: Tensor) -> None:
    with pytest.raises(StoreError) as caught:
        load({f"{Q}.oft_blocks": numbers(4, 160, 160), f"{Q}.alpha": limit})
    assert caught.value.code == "bad-alpha"


@pytest.mark.parametrize(("source", "scale"), [("alpha", 0.5), ("config", 2.0)])
def test_of_two_scales_the_one_asked_for_is_taken(source: str, scale: float, tmp_path: Path) -> None:
    tensors = diffusers("k") | {f"{DOTTED}k.alpha": torch.tensor(2.0)}
    path = write(tmp_path / "style.safetensors", tensors, config_of())
    found = check_converts(path, "kohya", tmp_path / "new", "--scale-from", source)
    assert [one["value"] for one in cast(list[dict[str, float]], found["scales"])] == [scale]


def test_metadata_cannot_drive_a_terminal(tmp_path: Path) -> None:
    evil = {
        "modelspec.title": "\x1b]0;owned\x07 \u202egpj.exe [red]not markup[/red]",
        "ss_output_name": "a\r\nb",
    }
    path = write(tmp_path / "style.safetensors", kohya(), evil)
    for result in (run("inspect", path, "--metadata"), run("inspect", path)):
        assert result.exit_code == 0
        shown = result.stdout.replace("\n", "")
        assert shown.isprintable()
        assert "\\x1b]0;owned\\x07 \\u202egpj.exe [red]not markup[/red]" in shown
    check_converts(path, "diffusers", tmp_path / "new.safetensors")
    assert evil.items() <= inspect(tmp_path / "new.safetensors").notes.items()
