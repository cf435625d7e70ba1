"""The difference of two models comes out as it was put in, from any files, and nothing is lost in silence."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

import models
import numpy as np
import pytest
import torch
from checkpoints import Tensors, planted, plus, renamed, save_folder, save_shards
from extractions import assert_balances, assert_recovered, deltas, error, everything_moves
from safetensors import safe_open
from safetensors.torch import save_file

import adapterkit
from adapterkit import ExtractOptions, RankRule, extract, plan_extraction
from adapterkit.errors import Refused, UsageError

UNET = models.sd1_unet().state_dict()
CLIP = models.clip_l().state_dict()
LLAMA = models.llama().state_dict()
ATTENTION = ("attn1.to_", "attn2.to_")
KEY = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
CONV = "mid_block.resnets.0.conv1"


# A small part of a network, for what need not be shown on all of it.
MIDDLE = ("mid_block",)


# What was planted comes back


@pytest.mark.parametrize("to", ["kohya", "kohya-ldm", "diffusers", "comfyui", "peft", "lycoris"])
def test_planted_low_rank_differences_come_back_in_any_format(to: str, tmp_path: Path) -> None:
    wanted = planted(UNET, 4, 0.1, ATTENTION)
    output = tmp_path / ("out" if to == "peft" else "out.safetensors")
    done = extract(plus(UNET, wanted), UNET, output, RankRule(rank=4), ExtractOptions(to=to))
    assert_recovered(adapterkit.load(output, family="sd1"), wanted, 1e-5)
    assert done.kept == pytest.approx(1.0)
    assert {outcome.rank for outcome in done.outcomes if outcome.what == "extracted"} == {4}


def test_kernels_of_convolutions_are_kept() -> None:
    wanted = planted(UNET, 3, 0.1, ("conv",))
    done = extract(plus(UNET, wanted), UNET, rule=RankRule(rank=3))
    assert_recovered(done.adapter, wanted, 1e-5)
    down = done.state_dict()[f"lora_unet_{CONV.replace('.', '_')}.lora_down.weight"]
    assert down.shape == (3, *UNET[f"{CONV}.weight"].shape[1:])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rounded_base", [True, False])
def test_auto_finds_the_rank_of_what_was_merged_into_a_model_of_16_bits(
    dtype: torch.dtype, rounded_base: bool
) -> None:
    generator = torch.Generator().manual_seed(0)
    weights = {
        f"layers.{i}.up_proj.weight": torch.randn(160, 192, generator=generator) * 0.02 for i in range(4)
    }
    base = plus(weights, {}, dtype)
    tuned = plus(base if rounded_base else weights, planted(weights, 6, 0.05), dtype)
    done = extract(tuned, base, options=ExtractOptions(family="transformers"))
    assert [outcome.rank for outcome in done.outcomes] == [6, 6, 6, 6]


def test_auto_finds_the_rank_in_32_bits() -> None:
    wanted = planted(UNET, 3, 0.05, ATTENTION)
    done = extract(plus(UNET, wanted), UNET)
    assert {outcome.rank for outcome in done.outcomes if outcome.energy} == {3}
    assert done.rule.auto and done.rule.most == 128


def test_only_the_rounding_of_a_model_is_no_adapter() -> None:
    with pytest.raises(Refused) as caught:
        extract(plus(UNET, {}, torch.float16), UNET, options=ExtractOptions(only=MIDDLE))
    assert caught.value.code == "no-difference"


def test_no_number_is_clamped() -> None:
    """Clamping factors at their 99 % quantile raises the error of a rank-8 delta from 0.002 to 0.11."""
    wanted = planted({f"{KEY}.weight": UNET[f"{KEY}.weight"]}, 8, 0.5)
    base = plus(UNET, {}, torch.float16)
    done = extract(
        plus(UNET, wanted, torch.float16), base, rule=RankRule(rank=8), options=ExtractOptions(only=(KEY,))
    )
    assert error(next(iter(deltas(done.adapter).values())), wanted[f"{KEY}.weight"]) < 0.003


@pytest.mark.parametrize("exact", [True, False])
def test_the_error_is_that_of_the_best_approximation(exact: bool) -> None:
    """NumPy's SVD of the difference itself is what other tools truncate; nothing of a rank is better."""
    generator = torch.Generator().manual_seed(1)
    base = {
        "model.embed_tokens.weight": torch.zeros(4, 96),
        "x.weight": torch.randn(400, 96, generator=generator),
    }
    tuned = {**base, "x.weight": base["x.weight"] + 0.1 * torch.randn(400, 96, generator=generator)}
    done = extract(tuned, base, rule=RankRule(rank=8), options=ExtractOptions(exact=exact))
    delta = (tuned["x.weight"] - base["x.weight"]).double()
    values = np.linalg.svd(delta.numpy(), compute_uv=False)
    least = math.sqrt((values[8:] ** 2).sum() / (values**2).sum())
    assert least * (1 - 1e-9) <= error(deltas(done.adapter)["x.weight"], delta) <= least * 1.001
    assert done.outcomes[-1].error == pytest.approx(least, rel=1e-3)


def test_the_sizes_and_errors_told_are_those_of_the_tensors() -> None:
    generator = torch.Generator().manual_seed(2)
    base = {"model.embed_tokens.weight": torch.zeros(4, 96), "x.weight": torch.zeros(60, 96)}
    base["x.weight"] = torch.randn(60, 96, generator=generator)
    tuned = {**base, "x.weight": base["x.weight"] + torch.randn(60, 96, generator=generator)}
    # Of all the values that are looked for, this keeps some.
    done = extract(tuned, base, rule=RankRule(energy=0.6), options=ExtractOptions(exact=True))
    delta = (tuned["x.weight"] - base["x.weight"]).double().numpy()
    squares = np.linalg.svd(delta, compute_uv=False) ** 2
    rank = int(np.searchsorted(np.cumsum(squares) / squares.sum(), 0.6)) + 1
    outcome = done.outcomes[-1]
    assert outcome.rank == rank < 40
    assert outcome.energy == pytest.approx(squares.sum(), rel=1e-6)
    assert outcome.change == pytest.approx(np.linalg.norm(delta) / np.linalg.norm(base["x.weight"]), rel=1e-6)
    assert outcome.left == pytest.approx(squares[rank:].sum(), rel=1e-5)
    assert done.kept == pytest.approx(squares[:rank].sum() / squares.sum(), rel=1e-5)


def test_alpha_is_free_and_changes_nothing_but_the_scale() -> None:
    wanted = planted(UNET, 4, 0.1, ATTENTION)
    done = extract(plus(UNET, wanted), UNET, rule=RankRule(rank=4), options=ExtractOptions(alpha=1.0))
    assert_recovered(done.adapter, wanted, 1e-5)
    tensors = done.state_dict()
    assert {float(tensor) for key, tensor in tensors.items() if key.endswith(".alpha")} == {1.0}


def test_the_number_of_threads_changes_no_bit() -> None:
    tuned = plus(UNET, planted(UNET, 4, 0.1, ("conv", *ATTENTION)), torch.float16)
    base = plus(UNET, {}, torch.float16)
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            options = ExtractOptions(only=("down_blocks",))
            found.append(extract(tuned, base, rule=RankRule(rank=2), options=options).state_dict())
    finally:
        torch.set_num_threads(threads)
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][key], found[1][key]) for key in found[0])


# Layouts of checkpoints


def test_a_single_original_file_and_a_folder_of_diffusers_are_as_good_as_two_alike(tmp_path: Path) -> None:
    unet, clip = planted(UNET, 3, 0.1, ATTENTION), planted(CLIP, 2, 0.001, ("mlp.fc1", "q_proj"))
    single = renamed(plus(UNET, unet), "sd1", "model.diffusion_model.", "unet", "ldm")
    single |= renamed(plus(CLIP, clip), "sd1", "cond_stage_model.transformer.", "text_encoder", "hf")
    single["first_stage_model.encoder.conv_in.weight"] = torch.zeros(8, 3, 3, 3)
    save_file(single, tmp_path / "tuned.safetensors")
    save_shards(tmp_path / "base" / "unet", "diffusion_pytorch_model", UNET)
    save_folder(tmp_path / "base" / "text_encoder", "model.safetensors", CLIP, {})
    output = tmp_path / "out.safetensors"
    done = extract(tmp_path / "tuned.safetensors", tmp_path / "base", output)
    both = {f"{name}": delta for name, delta in {**unet, **clip_names(clip)}.items()}
    assert_recovered(adapterkit.load(output), both, 1e-4)
    assert done.tensors["first_stage_model.encoder.conv_in.weight"] == "unknown"
    assert done.proof is not None and done.proof.measured == pytest.approx(done.proof.predicted, abs=1e-5)


def clip_names(tensors: Mapping[str, torch.Tensor]) -> Tensors:
    """The names with the outer module's, which newer versions of transformers leave away."""
    return {key if key.startswith("text_model.") else f"text_model.{key}": t for key, t in tensors.items()}


def test_a_fused_layer_is_extracted_as_one_from_a_model_that_has_it_apart(tmp_path: Path) -> None:
    flux = models.flux_transformer().state_dict()
    wanted = planted(flux, 2, 0.1, ("attn.to_q", "attn.to_k", "attn.to_v"))
    tuned = renamed(plus(flux, wanted), "flux1", "", "transformer", "bfl")
    done = extract(
        tuned, flux, rule=RankRule(rank=6), options=ExtractOptions(exclude=("single_transformer_blocks",))
    )
    ups = [key for key in done.state_dict() if key.endswith("lora_up.weight")]
    assert ups and all("_attn_qkv" in key for key in ups)
    for place, (change,) in done.adapter.changes.items():
        parts = torch.cat([wanted[f"{piece.module}.weight"] for piece in place.span])
        assert error(change.dense(), parts) < 1e-5


def test_a_base_without_what_stands_before_its_names_is_the_same_base() -> None:
    bare = {key.removeprefix("model."): tensor for key, tensor in LLAMA.items() if key != "lm_head.weight"}
    wanted = planted(LLAMA, 2, 0.1, ("q_proj", "mlp"))
    done = extract(plus(LLAMA, wanted), bare, rule=RankRule(rank=2))
    assert_recovered(done.adapter, wanted, 1e-5)
    assert done.tensors["lm_head.weight"] == "new"


def test_text_encoders_are_compared_on_their_own_merits() -> None:
    """sd-scripts passes over a text encoder whose greatest difference is below 0.01."""
    unet, clip = planted(UNET, 2, 0.1, ATTENTION), planted(CLIP, 2, 1e-4, ("mlp",))
    both = {f"unet/{k}": t for k, t in UNET.items()} | {f"text_encoder/{k}": t for k, t in CLIP.items()}
    moved = {f"unet/{k}": t for k, t in unet.items()} | {f"text_encoder/{k}": t for k, t in clip.items()}
    done = extract(plus(both, moved), both, rule=RankRule(rank=2))
    counts = [place.component for place in done.adapter.changes]
    assert counts.count("text_encoder") == len(clip) and counts.count("unet") == len(unet)
    assert max(float(delta.abs().max()) for delta in clip.values()) < 0.01


# What is not extracted is said


@pytest.mark.parametrize(
    "options",
    [
        ExtractOptions(),
        ExtractOptions(full_small=True),
        ExtractOptions(embeddings=True),
        ExtractOptions(full_small=True, embeddings=True),
        ExtractOptions(only=("*.mlp.*",)),
    ],
    ids=["plain", "small", "embeddings", "all", "only"],
)
def test_every_tensor_is_counted_once_and_all_energy_adds_up(options: ExtractOptions) -> None:
    tuned = everything_moves(LLAMA) | {"odd.count": torch.ones(3, dtype=torch.int64)}
    done = extract(tuned, LLAMA, rule=RankRule(rank=4), options=options)
    assert_balances(done, tuned)
    assert done.tensors["odd.count"] == "new"
    assert ("vector" in done.left) is not (options.full_small or bool(options.only))
    assert ("embedding" in done.left) is not (options.embeddings or bool(options.only))


def test_the_energy_left_out_is_what_is_missing() -> None:
    tuned = everything_moves(LLAMA)
    done = extract(tuned, LLAMA, rule=RankRule(rank=4))
    found = deltas(done.adapter)
    missing = total = 0.0
    for key, weight in tuned.items():
        delta = weight.double() - LLAMA[key].double()
        total += float(delta.square().sum())
        missing += float((delta - found[key].double() if key in found else delta).square().sum())
    assert done.energy == pytest.approx(total, rel=1e-6)
    assert 1 - done.kept == pytest.approx(missing / total, rel=1e-5)


@pytest.mark.parametrize(("to", "suffix"), [("kohya", ".diff"), ("peft", ".weight")])
def test_norms_and_biases_are_kept_whole_when_asked(to: str, suffix: str, tmp_path: Path) -> None:
    base, family = (UNET, "sd1") if to == "kohya" else (LLAMA, None)
    tuned = everything_moves(base)
    only = MIDDLE if to == "kohya" else ()
    options = ExtractOptions(to=to, full_small=True, family=family, only=only, verify="full")
    output = tmp_path / ("out" if to == "peft" else "out.safetensors")
    done = extract(tuned, base, output, RankRule(rank=1), options)
    written = adapterkit.load(output, family=family)
    small = [o for o in done.outcomes if o.what == "whole"]
    assert len(small) == sum(t.ndim == 1 for key, t in base.items() if key.startswith(only or ""))
    for outcome in small:
        (change,) = [c for c in written.changes[outcome.line.place] if c.kind in ("diff", "set")]
        key = outcome.line.keys[0]
        assert error(change.dense(base[key]), tuned[key] - base[key]) < 1e-4


def test_a_format_that_cannot_say_norms_refuses_them() -> None:
    with pytest.raises(Refused) as caught:
        extract(
            everything_moves(UNET),
            UNET,
            rule=RankRule(rank=1),
            options=ExtractOptions(to="diffusers", full_small=True, only=MIDDLE),
        )
    assert "norm" in caught.value.message


def test_what_the_format_cannot_say_is_counted_as_lost_when_that_is_allowed() -> None:
    tuned = everything_moves(UNET)
    options = ExtractOptions(to="diffusers", full_small=True, only=MIDDLE, allow={"untranslatable"})
    done = extract(tuned, UNET, rule=RankRule(rank=1), options=options)
    assert_balances(done, tuned)
    assert "whole" not in done.tensors.values() and done.left["untranslatable"] > 0


def test_the_same_in_both_is_passed_over() -> None:
    wanted = planted(UNET, 2, 0.1, (KEY,))
    done = extract(plus(UNET, wanted), UNET)
    counts = [outcome.what for outcome in done.outcomes]
    assert counts.count("unchanged") == len(UNET) - 1


def test_identical_models_are_refused() -> None:
    with pytest.raises(Refused) as caught:
        extract(UNET, dict(UNET))
    assert caught.value.code == "no-difference"


def test_a_difference_in_norms_alone_says_how_to_keep_it() -> None:
    tuned = {key: tensor + 0.1 if tensor.ndim == 1 else tensor for key, tensor in UNET.items()}
    with pytest.raises(Refused) as caught:
        extract(tuned, UNET)
    assert caught.value.code == "no-difference" and "--full-small" in caught.value.hint
    assert extract(tuned, UNET, options=ExtractOptions(full_small=True)).kept == 1.0


def test_selection_takes_components_and_modules_by_name() -> None:
    wanted = planted(UNET, 2, 0.1, ATTENTION)
    tuned = plus(UNET, wanted)
    names = {key for key in wanted if "attn1" in key and "up_blocks" not in key}
    options = ExtractOptions(only=("*.attn1.*",), exclude=("up_blocks",))
    done = extract(tuned, UNET, rule=RankRule(rank=2), options=options)
    assert set(deltas(done.adapter)) == names
    assert "not selected" in done.tensors.values()
    assert_balances(done, tuned)


# Language models


def test_grown_vocabularies_are_compared_where_both_have_rows() -> None:
    wanted = planted(LLAMA, 3, 0.1, ("embed_tokens", "lm_head", "q_proj"))
    tuned = plus(LLAMA, wanted)
    for key in ("model.embed_tokens.weight", "lm_head.weight"):
        tuned[key] = torch.cat([tuned[key], torch.ones(5, tuned[key].shape[1])])
    done = extract(tuned, LLAMA, rule=RankRule(rank=3), options=ExtractOptions(embeddings=True))
    assert_recovered(done.adapter, wanted, 1e-5)
    assert [outcome.line.new for outcome in done.outcomes if outcome.line.new] == [5, 5]
    assert sum("5 rows more" in note for note in done.pairing.notes) == 2


def test_a_vocabulary_that_shrank_gets_rows_of_zeros() -> None:
    wanted = planted(LLAMA, 3, 0.1, ("embed_tokens",))
    tuned = plus(LLAMA, wanted)
    for key in ("model.embed_tokens.weight", "lm_head.weight"):
        tuned[key] = tuned[key][:-7]
    done = extract(tuned, LLAMA, rule=RankRule(rank=3), options=ExtractOptions(embeddings=True))
    found = deltas(done.adapter)["model.embed_tokens.weight"]
    assert found.shape == LLAMA["model.embed_tokens.weight"].shape
    assert error(found[:-7], wanted["model.embed_tokens.weight"][:-7]) < 1e-5
    assert not found[-7:].any()
    assert {outcome.line.new for outcome in done.outcomes} == {0}
    assert sum("7 rows fewer" in note for note in done.pairing.notes) == 2


def test_a_tied_output_layer_is_compared_once(tmp_path: Path) -> None:
    model = models.llama(tied=True)
    tensors = model.state_dict()
    assert tensors["lm_head.weight"].data_ptr() == tensors["model.embed_tokens.weight"].data_ptr()
    tuned = {key: tensor + 0.01 for key, tensor in tensors.items()}
    tuned["lm_head.weight"] = tuned["model.embed_tokens.weight"]
    done = extract(tuned, tensors, rule=RankRule(rank=2), options=ExtractOptions(embeddings=True))
    assert done.tensors["lm_head.weight"] == "tied"
    stored = {key: tensor for key, tensor in tensors.items() if key != "lm_head.weight"}
    config = {"tie_word_embeddings": True, "architectures": ["LlamaForCausalLM"]}
    save_folder(
        tmp_path / "tuned", "model.safetensors", {**stored, "model.norm.weight": torch.zeros(32)}, config
    )
    save_folder(tmp_path / "base", "model.safetensors", stored, config)
    pairing = plan_extraction(tmp_path / "tuned", tmp_path / "base")
    assert any("tied" in note for note in pairing.notes)


def test_a_tied_output_layer_alone_is_nothing_to_extract(tmp_path: Path) -> None:
    tensors = {key: tensor.clone() for key, tensor in models.llama(tied=True).state_dict().items()}
    tuned = {key: tensor + 0.01 for key, tensor in tensors.items()}
    for name, numbers in (("tuned", tuned), ("base", tensors)):
        save_folder(tmp_path / name, "model.safetensors", numbers, {"tie_word_embeddings": True})
    options = ExtractOptions(embeddings=True, only=("lm_head",))
    with pytest.raises(UsageError, match="tied to the embedding") as caught:
        extract(tmp_path / "tuned", tmp_path / "base", rule=RankRule(rank=2), options=options)
    assert caught.value.code == "no-match" and caught.value.hint


def test_the_configuration_names_the_base_and_the_task(tmp_path: Path) -> None:
    wanted = planted(LLAMA, 2, 0.1, ("q_proj",))
    config = {"architectures": ["LlamaForCausalLM"], "_name_or_path": "someone/tiny-llama"}
    save_folder(tmp_path / "base", "model.safetensors", LLAMA, config)
    save_shards(tmp_path / "tuned", "model", plus(LLAMA, wanted))
    extract(tmp_path / "tuned", tmp_path / "base", tmp_path / "out")
    written = json.loads((tmp_path / "out" / "adapter_config.json").read_text("utf-8"))
    assert written["base_model_name_or_path"] == "someone/tiny-llama"
    assert written["task_type"] == "CAUSAL_LM" and written["r"] == written["lora_alpha"] == 2


def test_stacks_of_experts_are_said_to_be_left_out() -> None:
    tensors = models.mixtral().state_dict()
    done = extract(everything_moves(tensors), tensors, rule=RankRule(rank=2))
    experts = [key for key, what in done.tensors.items() if what == "experts"]
    assert experts and all(tensors[key].ndim == 3 for key in experts)
    assert done.left["experts"] > 0


# Metadata


def test_the_metadata_says_from_what_and_how(tmp_path: Path) -> None:
    save_file(plus(UNET, planted(UNET, 4, 0.1, ATTENTION)), tmp_path / "tuned.safetensors")
    save_file(UNET, tmp_path / "base.safetensors")
    paths = tmp_path / "tuned.safetensors", tmp_path / "base.safetensors", tmp_path / "out.safetensors"
    extract(*paths, RankRule(rank=4), ExtractOptions(alpha=2.0, only=MIDDLE))
    with safe_open(paths[2], "pt") as file:
        metadata = file.metadata()
    (step,) = json.loads(metadata["adapterkit"])
    assert step == {
        "operation": "extract",
        "rank": 4,
        "alpha": 2.0,
        "tuned": "tuned.safetensors",
        "base": "base.safetensors",
        "only": ["mid_block"],
    }
    assert metadata["ss_network_dim"] == "4" and metadata["ss_network_alpha"] == "2"
    assert metadata["ss_network_module"] == "networks.lora"
    assert adapterkit.inspect(paths[2]).family == "sd1"


def test_the_same_request_writes_the_same_bytes(tmp_path: Path) -> None:
    tuned = plus(UNET, planted(UNET, 4, 0.1, ATTENTION), torch.float16)
    base = plus(UNET, {}, torch.float16)
    for name in ("one", "two"):
        extract(tuned, base, tmp_path / name, RankRule(energy=0.9), ExtractOptions(only=MIDDLE))
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


@pytest.mark.parametrize(
    ("tuned", "asked", "dtype"),
    [
        (torch.float16, None, torch.float16),
        (torch.bfloat16, None, torch.bfloat16),
        (torch.float32, None, torch.float32),
        (torch.float64, None, torch.float32),
        (torch.float32, "bf16", torch.bfloat16),
    ],
)
def test_factors_have_the_dtype_of_the_model_or_the_one_asked_for(
    tuned: torch.dtype, asked: str | None, dtype: torch.dtype
) -> None:
    done = extract(
        plus(LLAMA, planted(LLAMA, 2, 0.3, ("q_proj",)), tuned),
        plus(LLAMA, {}, tuned),
        rule=RankRule(rank=2),
        options=ExtractOptions(dtype=asked),
    )
    assert {tensor.dtype for tensor in done.state_dict().values()} == {dtype}


def test_a_file_is_never_larger_than_asked(tmp_path: Path) -> None:
    tuned = everything_moves(UNET)
    options = ExtractOptions(only=MIDDLE)
    extract(tuned, UNET, tmp_path / "out.safetensors", RankRule(size=100_000), options)
    assert 95_000 < (tmp_path / "out.safetensors").stat().st_size <= 100_000
