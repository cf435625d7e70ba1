"""Ruling a network out by the beginnings of its names never rules out one that knows the name."""

from __future__ import annotations

import pytest

from adapterkit.specs.names import heads, network, network_names


@pytest.mark.parametrize("name", network_names())
def test_every_native_name_begins_with_a_head(name: str) -> None:
    beginnings = heads(name)
    for naming in network(name).namings.values():
        for row in naming.rows:
            assert row.native.startswith(beginnings), (naming.name, row.native)
            assert row.native.replace(".", "_").startswith(beginnings), (naming.name, row.native)


def test_heads_rule_out_what_another_network_calls_its_blocks() -> None:
    assert not "double_blocks.0.img_attn.qkv".startswith(heads("sd3_medium"))
    assert "double_blocks.0.img_attn.qkv".startswith(heads("flux1"))
