"""Quantised weights come back as the format's definition says, and nothing unknown passes for a weight.

The packers here are written from the definitions of the formats, in numpy, number by number.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch

from adapterkit.errors import Json, StoreError
from adapterkit.quantized import dequantized, quantization
from adapterkit.specs.quantizations import quantizations
from adapterkit.stores import Store, memory_store
from adapterkit.stores.model_folder import open_model

Tensors = dict[str, torch.Tensor]
RANDOM = np.random.default_rng(0)


def bit_stream(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes along the last axis as 32-bit words: code i takes the bits from i · bits on."""
    rows, count = codes.shape
    words = np.zeros((rows, -(-count * bits // 32)), np.uint64)
    for i in range(count):
        for bit in range(bits):
            word, place = divmod(i * bits + bit, 32)
            words[:, word] |= (codes[:, i].astype(np.uint64) >> np.uint64(bit) & np.uint64(1)) << np.uint64(
                place
            )
    return words.astype(np.uint32).view(np.int32)


def store_of(tensors: Mapping[str, np.ndarray | torch.Tensor], config: Json = None) -> Store:
    given = {key: torch.as_tensor(value).contiguous() for key, value in tensors.items()}
    sidecars = {} if config is None else {"config.json": {"quantization_config": config, "vocab_size": 7}}
    return memory_store(given, sidecars=sidecars)


def only(store: Store, name: str = "m.weight") -> torch.Tensor:
    """The one tensor of a dequantised store, in float32."""
    plain = dequantized(store, "F32")
    assert list(plain.tensors) == [name]
    assert plain.info(name).dtype == "F32"
    weight = plain.tensor(name)
    assert plain.info(name).shape == tuple(weight.shape)
    return weight


def equal(weight: torch.Tensor, wanted: np.ndarray, rel: float = 0) -> bool:
    """Equal to the last bit, or within the rounding of one float32 product."""
    return np.allclose(weight.double().numpy(), wanted.astype(np.float64), rtol=rel, atol=0)


# GPTQ


def gptq(
    bits: int,
    inputs: int,
    outputs: int,
    groups: int,
    *,
    ordered: bool = True,
    less: int = 1,
    symmetric: bool = False,
) -> tuple[Tensors, np.ndarray]:
    """A layer as AutoGPTQ packs it, zeros less one, and what it stands for."""
    codes = RANDOM.integers(0, 2**bits, (inputs, outputs))
    zeros = RANDOM.integers(1, 2**bits, (groups, outputs))
    if symmetric:
        zeros[:] = 2 ** (bits - 1)
    scales = RANDOM.uniform(0.001, 0.1, (groups, outputs)).astype(np.float16)
    group = np.arange(inputs) * groups // inputs
    if not ordered:
        group = RANDOM.permutation(group)
    weight = ((codes - zeros[group]) * scales[group].astype(np.float32)).T
    tensors = {
        "m.qweight": torch.from_numpy(bit_stream(codes.T, bits).T.copy()),
        "m.qzeros": torch.from_numpy(bit_stream(zeros - less, bits)),
        "m.scales": torch.from_numpy(scales),
        "m.g_idx": torch.from_numpy(group.astype(np.int32)),
    }
    return tensors, weight


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("ordered", [True, False])
def test_gptq_comes_back_exactly(bits: int, ordered: bool) -> None:
    tensors, weight = gptq(bits, 128, 64, 4, ordered=ordered)
    store = store_of(tensors, {"quant_method": "gptq", "bits": bits})
    assert quantization(store) == "gptq"
    assert equal(only(store), weight)


def test_gptq_in_its_second_version_keeps_zeros_as_they_are() -> None:
    tensors, weight = gptq(4, 64, 32, 2, less=0)
    assert equal(only(store_of(tensors, {"checkpoint_format": "gptq_v2"})), weight)


def test_gptq_zeros_of_nothing_wrap_around_as_they_were_written() -> None:
    """0 less 1 is all ones in four bits."""
    tensors, _ = gptq(4, 32, 8, 1)
    tensors["m.qzeros"] = torch.full_like(tensors["m.qzeros"], -1)
    codes = gptq_codes(tensors["m.qweight"])
    assert equal(
        only(store_of(tensors, {"quant_method": "gptq"})), codes * tensors["m.scales"].float().numpy().T
    )


def gptq_codes(words: torch.Tensor) -> np.ndarray:
    words = words.numpy().view(np.uint32)
    return np.stack([(words[i // 8] >> (4 * (i % 8))) & 15 for i in range(8 * len(words))], axis=1)


def test_gptq_without_an_order_of_groups_takes_them_in_turn() -> None:
    tensors, weight = gptq(4, 96, 16, 3)
    del tensors["m.g_idx"]
    assert equal(only(store_of(tensors, {"quant_method": "gptq"})), weight)


@pytest.mark.parametrize("less", [0, 1])
def test_gptq_without_a_configuration_is_told_by_symmetric_zeros(less: int) -> None:
    tensors, weight = gptq(4, 64, 32, 2, less=less, symmetric=True)
    assert equal(only(store_of(tensors)), weight)


def test_gptq_without_a_configuration_and_with_other_zeros_is_refused() -> None:
    tensors, _ = gptq(4, 64, 32, 2)
    with pytest.raises(StoreError, match="first or second version") as caught:
        only(store_of(tensors))
    assert caught.value.code == "quantized"


# AWQ


def test_awq_comes_back_exactly() -> None:
    inputs, outputs, groups = 64, 48, 2
    codes, zeros = RANDOM.integers(0, 16, (inputs, outputs)), RANDOM.integers(0, 16, (groups, outputs))
    scales = RANDOM.uniform(0.001, 0.1, (groups, outputs)).astype(np.float16)
    tensors = {"m.qweight": awq_words(codes), "m.qzeros": awq_words(zeros), "m.scales": scales}
    group = np.arange(inputs) * groups // inputs
    weight = ((codes - zeros[group]) * scales[group].astype(np.float32)).T
    store = store_of(tensors, {"quant_method": "awq", "version": "gemm"})
    assert quantization(store) == "awq"
    assert equal(only(store), weight)


def awq_words(codes: np.ndarray) -> np.ndarray:
    """Nibble i of a word holds column 0, 2, 4, 6, 1, 3, 5, 7 of its eight."""
    words = np.zeros((codes.shape[0], codes.shape[1] // 8), np.uint32)
    for column in range(words.shape[1]):
        for i, place in enumerate([0, 2, 4, 6, 1, 3, 5, 7]):
            words[:, column] |= codes[:, 8 * column + place].astype(np.uint32) << np.uint32(4 * i)
    return words.view(np.int32)


# compressed-tensors


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("asymmetric", [False, True])
def test_packed_integers_come_back_exactly(bits: int, groups: int, asymmetric: bool) -> None:
    outputs, inputs = 24, 64
    half = 2 ** (bits - 1)
    codes = RANDOM.integers(-half, half, (outputs, inputs))
    zeros = RANDOM.integers(-half, half, (outputs, groups)) * asymmetric
    scale = RANDOM.uniform(0.001, 0.1, (outputs, groups)).astype(np.float16)
    tensors = {
        "m.weight_packed": bit_stream(codes + half, bits),
        "m.weight_scale": scale,
        "m.weight_shape": np.array([outputs, inputs]),
    }
    if asymmetric:
        tensors["m.weight_zero_point"] = bit_stream((zeros + half).T, bits).T
    group = np.arange(inputs) * groups // inputs
    store = store_of(tensors)
    assert quantization(store) == "compressed-tensors"
    assert equal(only(store), (codes - zeros[:, group]) * scale[:, group].astype(np.float32))


def test_packed_integers_whose_groups_are_out_of_order_come_back() -> None:
    codes, scale = RANDOM.integers(-8, 8, (8, 32)), RANDOM.uniform(0.1, 1, (8, 4)).astype(np.float32)
    group = RANDOM.permutation(np.arange(32) // 8)
    tensors = {
        "m.weight_packed": bit_stream(codes + 8, 4),
        "m.weight_scale": scale,
        "m.weight_shape": np.array([8, 32]),
        "m.weight_g_idx": group.astype(np.int32),
    }
    assert equal(only(store_of(tensors)), codes.astype(np.float32) * scale[:, group])


# Codes beside a scale


def spread(scale: np.ndarray, rows: int, columns: int, block: tuple[int, int]) -> np.ndarray:
    return np.array([[scale[i // block[0], j // block[1]] for j in range(columns)] for i in range(rows)])


@pytest.mark.parametrize("end", ["weight_scale", "weight_scale_inv", "scale_weight"])
@pytest.mark.parametrize("shape", [(), (1,), (40, 1), (40,)])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8], ids=str)
def test_codes_times_their_scale(end: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    codes = torch.from_numpy(RANDOM.normal(0, 50, (40, 24))).float().to(dtype)
    scale = RANDOM.uniform(0.01, 1, shape).astype(np.float32)
    tensors = {"m.weight": codes, f"m.{end}": torch.tensor(scale), "m.input_scale": torch.tensor(0.5)}
    store = store_of({**tensors, "scaled_fp8": torch.empty(0).to(dtype)})
    assert quantization(store) == "scaled"
    assert equal(only(store), codes.float().numpy() * (scale.reshape(-1, 1) if scale.size > 1 else scale))


@pytest.mark.parametrize(
    ("size", "scale", "block", "config"),
    [
        ((300, 130), (3, 2), (128, 128), None),
        ((300, 130), (3, 2), (128, 128), [128, 128]),
        ((100, 90), (4, 3), (32, 32), [32, 32]),
        ((64, 96), (4, 3), (16, 32), None),
    ],
)
def test_codes_beside_a_scale_for_each_block(
    size: tuple[int, int], scale: tuple[int, int], block: tuple[int, int], config: Json
) -> None:
    codes = torch.from_numpy(RANDOM.normal(0, 50, size)).float().to(torch.float8_e4m3fn)
    scales = RANDOM.uniform(0.01, 1, scale).astype(np.float32)
    settings: Json = {"quant_method": "fp8", "weight_block_size": config} if config else None
    store = store_of({"m.weight": codes, "m.weight_scale_inv": scales}, settings)
    assert equal(only(store), codes.float().numpy() * spread(scales, *size, block))


def test_integers_around_a_zero_point_for_each_row() -> None:
    codes = torch.from_numpy(RANDOM.integers(-128, 128, (6, 40)).astype(np.int8))
    zeros = torch.from_numpy(RANDOM.integers(-9, 9, (6, 1)).astype(np.int8))
    scale = torch.rand(6, 1)
    store = store_of({"m.weight": codes, "m.weight_scale": scale, "m.weight_zero_point": zeros})
    assert equal(only(store), (codes.numpy() - zeros.numpy().astype(np.float32)) * scale.numpy())


@pytest.mark.parametrize("end", ["_scale_inv", "_scale"])
def test_stacked_experts_have_a_scale_for_each_block_of_each(end: str) -> None:
    codes = torch.from_numpy(RANDOM.normal(0, 50, (3, 256, 140))).float().to(torch.float8_e4m3fn)
    scales = RANDOM.uniform(0.01, 1, (3, 2, 2)).astype(np.float32)
    tensors = {"e.up": codes, f"e.up{end}": scales, "e.up_activation_scale": torch.ones(3)}
    weight = only(store_of(tensors), "e.up")
    wanted = [c * spread(s, 256, 140, (128, 128)) for c, s in zip(codes.float().numpy(), scales, strict=True)]
    assert equal(weight, np.stack(wanted))


def test_scales_may_be_powers_of_two_in_eight_bits() -> None:
    codes = torch.full((2, 4), 3.0).to(torch.float8_e4m3fn)
    scale = torch.tensor([[0.25], [8.0]]).to(torch.float8_e8m0fnu)
    assert only(store_of({"m.weight": codes, "m.weight_scale": scale})).tolist() == [[0.75] * 4, [24.0] * 4]


def comfy(form: Json) -> torch.Tensor:
    return torch.frombuffer(bytearray(json.dumps(form).encode()), dtype=torch.uint8)


def test_comfyui_says_the_format_of_each_weight() -> None:
    codes = torch.full((8, 4), 3.0).to(torch.float8_e4m3fn)
    tensors = {"m.weight": codes, "m.weight_scale": torch.tensor(0.5)}
    assert only(store_of({**tensors, "m.comfy_quant": comfy({"format": "float8_e4m3fn"})})).max() == 1.5
    for form in ({"format": "nvfp4"}, ["float8_e4m3fn"]):
        assert quantization(store_of({**tensors, "m.comfy_quant": comfy(form)})) == "unknown"


def test_eight_bits_of_bitsandbytes_are_rows_over_127() -> None:
    codes = torch.from_numpy(RANDOM.integers(-127, 128, (6, 5)).astype(np.int8))
    scale = RANDOM.uniform(0.1, 3, 6).astype(np.float32)
    tensors = {
        "m.weight": codes,
        "m.SCB": torch.from_numpy(scale),
        "m.weight_format": torch.tensor(0, dtype=torch.uint8),
    }
    assert quantization(store_of(tensors)) == "bitsandbytes-8bit"
    assert equal(only(store_of(tensors)), codes.numpy() * (scale[:, None].astype(np.float64) / 127), rel=2e-7)
    tensors["m.weight_format"] += 1
    assert quantization(store_of(tensors)) == "unknown"


# Blocks of four bits

NF4 = np.sort(RANDOM.normal(0, 0.4, 16)).astype(np.float32)


def four_bits(shape: tuple[int, ...], block: int = 64, nested: bool = False) -> tuple[Tensors, np.ndarray]:
    """A parameter in bitsandbytes' blocks of four bits, with any 16 values, and what it stands for."""
    count = int(np.prod(shape))
    codes = RANDOM.integers(0, 16, count + count % 2)
    maxima = RANDOM.uniform(0.5, 2, -(-count // block)).astype(np.float32)
    state: dict[str, Json] = {
        "quant_type": "nf4",
        "blocksize": block,
        "shape": list(shape),
        "dtype": "bfloat16",
    }
    tensors = {
        "m.weight": torch.from_numpy((codes[::2] << 4 | codes[1::2]).astype(np.uint8)).reshape(-1, 1),
        "m.weight.quant_map": torch.from_numpy(NF4),
    }
    if nested:
        kept = RANDOM.integers(0, 256, maxima.size).astype(np.uint8)
        values = RANDOM.normal(0, 1, 256).astype(np.float32)
        scales = RANDOM.uniform(0.5, 2, -(-maxima.size // 256)).astype(np.float32)
        maxima = values[kept] * scales[np.arange(maxima.size) // 256] + np.float32(0.25)
        state |= {"nested_blocksize": 256, "nested_offset": 0.25, "nested_dtype": "float32"}
        tensors["m.weight.nested_absmax"] = torch.from_numpy(scales)
        tensors["m.weight.nested_quant_map"] = torch.from_numpy(values)
        tensors["m.weight.absmax"] = torch.from_numpy(kept)
    else:
        tensors["m.weight.absmax"] = torch.from_numpy(maxima)
    tensors["m.weight.quant_state.bitsandbytes__nf4"] = comfy(state)
    weight = NF4[codes[:count]] * maxima[np.arange(count) // block]
    return tensors, weight.reshape(shape)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("shape", [(48, 64), (5, 13), (3, 4, 32), (1,), (700, 64)])
def test_blocks_of_four_bits_come_back_exactly(shape: tuple[int, ...], nested: bool) -> None:
    tensors, weight = four_bits(shape, nested=nested)
    store = store_of(tensors)
    assert quantization(store) == "bitsandbytes-4bit"
    assert equal(only(store), weight)


@pytest.mark.oracle
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_bitsandbytes_gives_the_same_numbers(kind: str, nested: bool, dtype: torch.dtype) -> None:
    functional = pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes is not installed")
    weight = torch.randn(96, 200, dtype=dtype)
    codes, state = functional.quantize_4bit(weight, quant_type=kind, compress_statistics=nested)
    tensors = {
        "m.weight": codes,
        **{f"m.weight.{key}": value for key, value in state.as_dict(packed=True).items()},
    }
    name = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}[dtype]
    ours = dequantized(store_of(tensors), name).tensor("m.weight")
    assert torch.equal(ours, functional.dequantize_4bit(codes, state))


@pytest.mark.oracle
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
def test_compressed_tensors_gives_the_same_numbers(symmetric: bool, bits: int) -> None:
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    args = QuantizationArgs(num_bits=bits, symmetric=symmetric, strategy="group", group_size=32)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    state = {
        "weight": torch.randn(40, 64),
        "weight_scale": torch.rand(40, 2) * 0.1,
        "weight_zero_point": torch.randint(-5, 6, (40, 2), dtype=torch.int8) * (not symmetric),
    }
    kept = PackedQuantizationCompressor.compress(state, scheme)
    ours = only(store_of({f"m.{key}": value for key, value in kept.items()}))
    assert torch.equal(ours, PackedQuantizationCompressor.decompress(kept, scheme)["weight"])


@pytest.mark.oracle
def test_transformers_gives_the_same_numbers_for_mxfp4() -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    blocks = torch.from_numpy(RANDOM.integers(0, 256, (3, 10, 4, 16)).astype(np.uint8))
    scales = torch.from_numpy(RANDOM.integers(100, 140, (3, 10, 4)).astype(np.uint8))
    store = store_of({"e.down_blocks": blocks, "e.down_scales": scales})
    assert quantization(store) == "mxfp4"
    assert torch.equal(only(store, "e.down"), convert_moe_packed_tensors(blocks, scales, dtype=torch.float32))


def test_mxfp4_has_the_values_of_its_standard() -> None:
    """1.5 · 2^(126 - 127) and -6 · 2^(126 - 127), the low half first."""
    blocks = torch.full((1, 1, 16), 0xF3, dtype=torch.uint8)
    weight = only(store_of({"e_blocks": blocks, "e_scales": torch.full((1, 1), 126, dtype=torch.uint8)}), "e")
    assert weight.shape == (32, 1)
    assert weight[:4, 0].tolist() == [0.75, -3.0, 0.75, -3.0]


# The store


def test_other_tensors_stay_as_they_are_and_weights_stand_in_their_place() -> None:
    tensors, _ = four_bits((8, 16))
    around = {"a.norm": torch.ones(3), **tensors, "z.bias": torch.ones(2).half()}
    plain = dequantized(store_of(around))
    assert list(plain.tensors) == ["a.norm", "m.weight", "z.bias"]
    assert plain.info("m.weight").dtype == "BF16"
    assert plain.tensor("z.bias") is not None
    assert bytes(plain.read("a.norm")) == torch.ones(3).numpy().tobytes()
    assert len(plain.read("m.weight")) == 8 * 16 * 2
    with pytest.raises(StoreError, match="no tensor"):
        plain.tensor("m.weight.absmax")


def test_the_numbers_are_rounded_once_to_the_dtype_asked_for() -> None:
    tensors, weight = four_bits((8, 16))
    for name, dtype in (("BF16", torch.bfloat16), ("F16", torch.float16)):
        assert torch.equal(
            dequantized(store_of(tensors), name).tensor("m.weight"), torch.tensor(weight).to(dtype)
        )


def test_the_configuration_no_longer_speaks_of_quantisation() -> None:
    tensors, _ = gptq(4, 64, 32, 2)
    assert dequantized(store_of(tensors, {"quant_method": "gptq"})).sidecars == {
        "config.json": {"vocab_size": 7}
    }


def test_a_pipeline_has_a_configuration_for_each_of_its_folders(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    for folder, less in (("text_encoder", 1), ("transformer", 0)):
        (tmp_path / folder).mkdir()
        tensors, weight = gptq(4, 64, 32, 2, less=less)
        save_file(tensors, tmp_path / folder / "model.safetensors")
        form = {"quant_method": "gptq", "checkpoint_format": "gptq" if less else "gptq_v2"}
        (tmp_path / folder / "config.json").write_text(json.dumps({"quantization_config": form}))
        np.save(tmp_path / f"{folder}.npy", weight)
    with dequantized(open_model(tmp_path, ["text_encoder", "transformer"]), "F32") as store:
        for folder in ("text_encoder", "transformer"):
            assert equal(store.tensor(f"{folder}/m.weight"), np.load(tmp_path / f"{folder}.npy"))
        assert store.sidecars == {"text_encoder/config.json": {}, "transformer/config.json": {}}


@pytest.mark.parametrize(
    "tensors",
    [
        {"w": torch.randn(64, 64)},
        {"w": torch.randn(64, 64).to(torch.float8_e4m3fn)},
        {"w": torch.randn(64, 64), "logit_scale": torch.tensor(1.0), "gate_scale": torch.ones(64)},
        {"w": torch.randn(64, 64), "position_ids": torch.arange(4096).reshape(1, -1)},
        {"w": torch.randn(64, 64), "position_ids": torch.arange(77, dtype=torch.int32).reshape(1, -1)},
        {"attn.bias": torch.ones(64, 64, dtype=torch.uint8).tril()},
    ],
)
def test_a_plain_base_is_offered_as_it_is(tensors: Tensors) -> None:
    store = store_of(tensors)
    assert quantization(store) is None
    assert dequantized(store) is store


CODES = torch.randint(0, 200, (64, 64), dtype=torch.uint8)
F8 = torch.randn(64, 64).to(torch.float8_e4m3fn)
# MLX, HQQ and NVFP4; scales that do not fit; a weight whose scale is lost; tensors cut off from their codes.
UNKNOWN: dict[str, Tensors] = {
    "mlx": {
        "m.weight": CODES.view(torch.uint32),
        "m.scales": torch.ones(64, 2),
        "m.biases": torch.ones(64, 2),
    },
    "hqq": {"m.W_q": CODES, "m.scale": torch.ones(64), "m.zero": torch.ones(64)},
    "nvfp4": {"m.weight": CODES, "m.weight_scale": F8, "m.weight_scale_2": torch.tensor(1.0)},
    "smooth": {"m.weight": F8, "m.weight_scale": torch.tensor(1.0), "m.pre_quant_scale": torch.ones(64)},
    "rows": {"m.weight": F8, "m.weight_scale": torch.ones(7)},
    "blocks": {"m.weight": F8, "m.weight_scale_inv": torch.ones(3, 3)},
    "lost": {"m.weight": CODES.view(torch.int8)},
    "halved": {"m.weight": CODES.reshape(-1, 1)},
    "gemv": {
        "m.qweight": CODES.view(torch.int32),
        "m.qzeros": CODES.view(torch.int32),
        "m.scales": torch.ones(3, 5),
    },
}


@pytest.mark.parametrize("tensors", UNKNOWN.values(), ids=UNKNOWN)
def test_what_is_not_known_is_refused_by_name(tensors: Tensors) -> None:
    store = store_of(tensors)
    assert quantization(store) == "unknown"
    with pytest.raises(StoreError, match="not known: `m") as caught:
        dequantized(store)
    assert caught.value.code == "quantized"


def test_a_configuration_that_speaks_of_a_quantisation_nobody_sees_is_not_believed_to_be_plain() -> None:
    with pytest.raises(StoreError, match="quantised in a way that is not known"):
        dequantized(store_of({"w": torch.randn(4, 4)}, {"quant_method": "aqlm"}))


def _drop(key: str) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.pop(key)


@pytest.mark.parametrize(
    "harm",
    [
        _drop("m.weight.quant_map"),
        _drop("m.weight.nested_absmax"),
        _drop("m.weight.quant_state.bitsandbytes__nf4"),
        lambda tensors: tensors.update({"m.weight": torch.zeros(7, 1, dtype=torch.uint8)}),
        lambda tensors: tensors.update(
            {"m.weight.quant_state.bitsandbytes__nf4": comfy({"shape": [8, -16]})}
        ),
        lambda tensors: tensors.update({"m.weight.quant_state.bitsandbytes__nf4": comfy([])}),
    ],
)
def test_a_weight_that_lacks_a_part_is_not_dequantised(harm: Callable[[Tensors], object]) -> None:
    tensors, _ = four_bits((64, 64), nested=True)
    harm(tensors)
    assert quantization(store_of(tensors)) == "unknown"


def test_every_method_says_what_it_is_and_where_it_is_from() -> None:
    for method in quantizations().methods.values():
        assert method.summary
        assert any(mark.isdigit() for mark in method.source)
