"""An accelerator gives the processor's result within one rounding; without one the processor stands in."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from bake_cases import LAYERS, adapter, base_tensors, loaded, lora, model_folder

from adapterkit.baking import desk as bake_desk
from adapterkit.baking import stream as bake_stream
from adapterkit.baking.arithmetic import Manner, baked_tensor
from adapterkit.operations.bake import BakeOptions, bake


@pytest.fixture
def on_a_desk(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The way over staged memory, on the processor itself."""
    place = bake_desk.DeviceDesk(torch.device("cpu"))
    monkeypatch.setattr("adapterkit.baking.arithmetic.desk", lambda device: place)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    yield


def test_the_way_over_a_device_gives_the_same(on_a_desk: None, tmp_path: Path) -> None:
    base = model_folder(tmp_path / "base", base_tensors(torch.bfloat16))
    path = adapter(tmp_path / "a", lora(1))
    bake(base, [path], tmp_path / "desk")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("adapterkit.baking.arithmetic.desk", bake_desk.desk)
        bake(base, [path], tmp_path / "plain")
    for name, tensor in loaded(tmp_path / "plain").items():
        assert tensor.equal(loaded(tmp_path / "desk")[name])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is an accelerator")
def test_the_processor_stands_in_where_there_is_none(tmp_path: Path) -> None:
    base = model_folder(tmp_path / "base", base_tensors())
    path = adapter(tmp_path / "a", lora(1))
    done = bake(base, [path], tmp_path / "out", BakeOptions(device="cuda"))
    assert any("computed on the processor" in text for text in done.notes)
    bake(base, [path], tmp_path / "plain")
    for name, tensor in loaded(tmp_path / "plain").items():
        assert tensor.equal(loaded(tmp_path / "out")[name])


def test_a_tensor_that_does_not_fit_is_computed_on_the_processor(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def full(*args: object) -> object:
        if args[2].device.type == "meta":  # type: ignore[attr-defined]
            # It was measured in part before memory ran out.
            baked_tensor(*args[:2], Manner(), args[3])  # type: ignore[arg-type]
            raise torch.OutOfMemoryError("no room")
        return baked_tensor(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(bake_stream, "baked_tensor", full)
    monkeypatch.setattr(
        "adapterkit.operations.bake_files.device_of", lambda name: torch.device(name or "cpu")
    )
    base = model_folder(tmp_path / "base", base_tensors())
    done = bake(base, [adapter(tmp_path / "a", lora(1))], tmp_path / "out", BakeOptions(device="meta"))
    assert f"{len(LAYERS)} tensors did not fit on the device: computed on the processor" in done.notes
    assert {kept.numbers for kept in done.kept.values()} == {16 * 8}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_cuda_is_the_processor_within_one_rounding(dtype: torch.dtype, tmp_path: Path) -> None:
    base = model_folder(tmp_path / "base", base_tensors(dtype))
    path = adapter(tmp_path / "a", lora(1))
    bake(base, [path], tmp_path / "out", BakeOptions(device="cuda"))
    bake(base, [path], tmp_path / "plain")
    step = torch.finfo(dtype).eps
    for name, tensor in loaded(tmp_path / "plain").items():
        assert torch.allclose(tensor.double(), loaded(tmp_path / "out")[name].double(), rtol=2 * step)
