"""What cannot be extracted is refused by name, and nothing is left half-written."""

from __future__ import annotations

import math
from pathlib import Path

import models
import pytest
import torch
from checkpoints import planted, plus
from extractions import assert_balances, deltas
from safetensors.torch import save_file

from adapterkit import ExtractOptions, RankRule, extract
from adapterkit.errors import AdapterkitError, Mismatch, Refused, StoreError, UsageError
from adapterkit.stores import memory_store

UNET = models.sd1_unet().state_dict()
CLIP = models.clip_l().state_dict()
LLAMA = models.llama().state_dict()
ATTENTION = ("attn1.to_", "attn2.to_")
KEY = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
SD1 = ExtractOptions(family="sd1")


def test_a_damaged_tensor_is_named_and_left_out_when_allowed() -> None:
    tuned = plus(UNET, planted(UNET, 2, 0.1, ATTENTION))
    tuned[f"{KEY}.weight"][3, 4] = math.nan
    tuned["conv_norm_out.bias"] = tuned["conv_norm_out.bias"].clone()
    tuned["conv_norm_out.bias"][0] = math.inf
    with pytest.raises(Refused) as caught:
        extract(tuned, UNET, rule=RankRule(rank=2))
    assert caught.value.code == "nonfinite"
    assert KEY in caught.value.message or "conv_norm_out" in caught.value.message
    done = extract(tuned, UNET, rule=RankRule(rank=2), options=ExtractOptions(allow={"nonfinite"}))
    left = {outcome.line.keys[0] for outcome in done.outcomes if outcome.what == "nonfinite"}
    assert left == {f"{KEY}.weight", "conv_norm_out.bias"}
    assert f"{KEY}.weight" not in deltas(done.adapter) and math.isfinite(done.energy)


def test_models_of_two_families_are_refused() -> None:
    with pytest.raises(Mismatch) as caught:
        extract(UNET, models.sdxl_unet().state_dict())
    assert caught.value.code == "base-family" and "Stable Diffusion XL" in caught.value.message


def test_models_of_two_sizes_are_refused() -> None:
    other = {key: torch.cat([tensor, tensor]) for key, tensor in UNET.items()}
    with pytest.raises(Mismatch) as caught:
        extract(UNET, other)
    assert caught.value.code == "base-shapes"


def test_two_parts_of_one_model_have_nothing_in_common() -> None:
    with pytest.raises(Mismatch) as caught:
        extract(UNET, CLIP, options=SD1)
    assert caught.value.code == "base-shapes"


def test_a_layer_of_another_width_is_left_out_by_name() -> None:
    tuned = plus(UNET, planted(UNET, 2, 0.1, ATTENTION))
    tuned["conv_in.weight"] = torch.zeros(32, 9, 3, 3)
    done = extract(tuned, UNET, rule=RankRule(rank=2))
    assert done.tensors["conv_in.weight"] == "shape"
    assert_balances(done, tuned)


def test_a_wrong_base_is_suspected() -> None:
    other = models.llama(seed=1).state_dict()
    assert extract(LLAMA, other, rule=RankRule(rank=1)).suspicious
    assert not extract(plus(LLAMA, planted(LLAMA, 2, 0.1)), LLAMA, rule=RankRule(rank=1)).suspicious


@pytest.mark.parametrize(
    ("options", "rule"),
    [
        (ExtractOptions(alpha=0.0), None),
        (ExtractOptions(alpha=math.nan), None),
        (ExtractOptions(to="kohia"), None),
        (ExtractOptions(dtype="fp8"), None),
        (ExtractOptions(device="abacus"), None),
        (ExtractOptions(device="meta"), None),
        (ExtractOptions(only=("nothing.here",)), None),
        (ExtractOptions(only=("model.norm",), exclude=("model.norm",)), None),
        (ExtractOptions(), RankRule(size=10)),
    ],
)
def test_requests_that_make_no_sense_are_refused_with_a_hint(
    options: ExtractOptions, rule: RankRule | None
) -> None:
    with pytest.raises(UsageError) as caught:
        extract(plus(LLAMA, planted(LLAMA, 2, 0.1)), LLAMA, rule=rule, options=options)
    assert caught.value.hint


def test_the_output_is_never_one_of_the_models(tmp_path: Path) -> None:
    save_file(plus(LLAMA, planted(LLAMA, 2, 0.1)), tmp_path / "tuned.safetensors")
    save_file(LLAMA, tmp_path / "base.safetensors")
    for name in ("tuned", "base"):
        with pytest.raises(StoreError) as caught:
            extract(
                tmp_path / "tuned.safetensors",
                tmp_path / "base.safetensors",
                tmp_path / f"{name}.safetensors",
                options=ExtractOptions(force=True, family="transformers"),
            )
        assert caught.value.code == "exists"


def test_a_failure_leaves_nothing_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from adapterkit.plan import Plan

    def fails(self: Plan, *arguments: object) -> object:
        raise OSError(28, "No space left on device")
        yield

    monkeypatch.setattr(Plan, "tensors", fails)
    with pytest.raises((OSError, AdapterkitError)):
        extract(plus(LLAMA, planted(LLAMA, 2, 0.1)), LLAMA, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_stores_and_progress_are_taken() -> None:
    told: list[tuple[str, int, int]] = []
    tuned = memory_store(plus(LLAMA, planted(LLAMA, 2, 0.1)))
    extract(tuned, memory_store(LLAMA), progress=lambda *facts: told.append(facts))
    assert told[-1][1] == told[-1][2] == len(LLAMA)
