"""Pickles that lie: the opcodes of attacks, and torch files around them."""

from __future__ import annotations

import io
import pickle
import struct
import zipfile
from pathlib import Path

MAGIC = 0x1950A86A20F9469CFC6C


def torch_zip(
    pickled: bytes,
    storages: dict[str, bytes] | None = None,
    root: str = "archive",
    method: int = zipfile.ZIP_STORED,
) -> bytes:
    """A file as torch.save writes it, around any pickle."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        archive.writestr(f"{root}/data.pkl", pickled)
        archive.writestr(f"{root}/byteorder", b"little")
        for key, data in (storages or {}).items():
            archive.writestr(f"{root}/data/{key}", data)
        archive.writestr(f"{root}/version", b"3\n")
    return buffer.getvalue()


def torch_legacy(pickled: bytes, storages: bytes = b"", keys: object = ()) -> bytes:
    """A file as torch.save wrote it before 1.6, around any pickle."""
    machine = {
        "protocol_version": 1001,
        "little_endian": True,
        "type_sizes": {"short": 2, "int": 4, "long": 4},
    }
    head = b"".join(pickle.dumps(value, 2) for value in (MAGIC, 1001, machine))
    return head + pickled + pickle.dumps(list(keys) if isinstance(keys, tuple) else keys, 2) + storages


def text(value: str) -> bytes:
    """The opcodes that push a text."""
    raw = value.encode()
    return b"X" + struct.pack("<I", len(raw)) + raw


def tensor(
    shape: tuple[int, ...], strides: tuple[int, ...], elements: int, offset: int = 0, view: bytes = b""
) -> bytes:
    """The opcodes that push a float32 tensor on storage "0". view: what legacy files add to the storage."""

    def numbers(values: tuple[int, ...]) -> bytes:
        return b"(" + b"".join(b"\x8a\x0a" + v.to_bytes(10, "little", signed=True) for v in values) + b"t"

    count = b"\x8a\x0a" + elements.to_bytes(10, "little")
    storage = (
        b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu") + count + view + b"tQ"
    )
    start = b"\x8a\x0a" + offset.to_bytes(10, "little", signed=True)
    return (
        b"ctorch._utils\n_rebuild_tensor_v2\n("
        + storage
        + start
        + numbers(shape)
        + numbers(strides)
        + b"\x89ccollections\nOrderedDict\n)RtR"
    )


def state_dict(value: bytes) -> bytes:
    """A pickle of a dict whose one entry, `a`, is what the opcodes push."""
    return b"\x80\x02}" + text("a") + value + b"s."


def attacks(canary: Path) -> dict[str, tuple[bytes, str]]:
    """Pickles that would create the canary, or reach for the means to: (pickle, what the refusal names)."""
    touch = text(f"touch {canary}")
    code = text(f"open({str(canary)!r}, 'w')")
    return {
        "os.system": (state_dict(b"cos\nsystem\n(" + touch + b"tR"), "`os.system`"),
        "posix.system": (state_dict(b"cposix\nsystem\n(" + touch + b"tR"), "`posix.system`"),
        "eval": (state_dict(b"cbuiltins\neval\n(" + code + b"tR"), "`builtins.eval`"),
        "a name put together on the stack": (
            b"\x80\x04" + text("os") + text("system") + b"\x93(" + touch + b"tR.",
            "`os.system`",
        ),
        "a name out of the memo": (
            b"\x80\x04" + text("system") + b"\x94" + text("os") + b"\x94h\x01h\x00\x93(" + touch + b"tR.",
            "`os.system`",
        ),
        "numpy.__builtins__": (state_dict(b"cnumpy\n__builtins__\n"), "`numpy.__builtins__`"),
        "getattr": (
            state_dict(b"cbuiltins\ngetattr\n(" + text("x") + text("y") + b"tR"),
            "`builtins.getattr`",
        ),
        "a dotted way out of torch": (
            state_dict(b"ctorch._utils\nos.system\n(" + touch + b"tR"),
            "`torch._utils.os.system`",
        ),
        "torch.load": (state_dict(b"ctorch\nload\n(" + touch + b"tR"), "`torch.load`"),
        "_load_from_bytes": (
            state_dict(b"ctorch.storage\n_load_from_bytes\n(" + touch + b"tR"),
            "_load_from_bytes",
        ),
        "a module": (
            state_dict(b"ctorch.nn.modules.linear\nLinear\n)\x81"),
            "torch.nn.modules.linear.Linear",
        ),
        "INST": (state_dict(b"(" + touch + b"ios\nsystem\n"), "`os.system`"),
        "OBJ": (state_dict(b"(ccollections\nOrderedDict\no"), "`OBJ`"),
        "NEWOBJ": (state_dict(b"ccollections\nOrderedDict\n)\x81"), "`NEWOBJ`"),
        "an extension code": (state_dict(b"\x82\x01"), "`EXT1`"),
        "a persistent id as text": (state_dict(b"Pos.system\n"), "`PERSID`"),
        "a call of a dtype": (state_dict(b"ctorch\nfloat16\n)R"), "would call"),
        "a call of a value": (state_dict(text("os.system") + b")R"), "would call"),
        "new defaults for a constructor": (
            state_dict(b"ctorch._utils\n_rebuild_tensor_v2\nN}" + text("__defaults__") + b")s\x86b"),
            "would change",
        ),
        "a state for a dtype": (state_dict(b"ctorch\nfloat16\n}b"), "would change"),
        "a second call behind the first": (
            b"\x80\x02}" + text("a") + b"ccollections\nOrderedDict\n)Rscos\nsystem\n(" + touch + b"tR0.",
            "`os.system`",
        ),
        "rebuilding by os.system": (
            state_dict(
                b"ctorch._tensor\n_rebuild_from_type_v2\n(cos\nsystem\nctorch\nTensor\n(" + touch + b"t}tR"
            ),
            "`os.system`",
        ),
    }


# Pickles that are damaged or would take memory or time without end: (pickle, what the message says)
BOMBS: dict[str, tuple[bytes, str]] = {
    "a text longer than the file": (b"\x80\x02\x8d" + b"\xff" * 8 + b".", "bytes are promised"),
    "a name that is no text": (b"\x80\x04K\x01K\x02\x93.", "not text"),
    "a text a little longer than the file": (b"\x80\x02X\x10\0\0\0abc.", "bytes are promised"),
    "a name of one text and one number": (b"\x80\x04" + text("os") + b"K\x02\x93.", "not text"),
    "a pair for a list": (b"\x80\x02]Na" + b"K\x00Ns.", "only a dictionary takes pairs"),
    "an ordered dict of a dict": (
        state_dict(b"ccollections\nOrderedDict\n(}" + text("ab") + b"NstR"),
        "an ordered dictionary of something odd",
    ),
    "a storage of no type": (
        state_dict(b"(" + text("storage") + text("float") + text("0") + text("cpu") + b"K\x01tQ"),
        "no storage",
    ),
    "a storage without a key": (
        state_dict(b"(" + text("storage") + b"ctorch\nFloatStorage\nK\x00" + text("cpu") + b"K\x01tQ"),
        "no storage",
    ),
    "a storage of no size": (
        state_dict(b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu") + b"NtQ"),
        "not a natural number",
    ),
    "a numpy number of no dtype": (
        state_dict(b"cnumpy.core.multiarray\nscalar\n(" + text("f8") + b"C\x08" + bytes(8) + b"tR"),
        "an odd numpy scalar",
    ),
    "a numpy number of big-endian bytes": (
        state_dict(b"cnumpy\ndtype\n(" + text("f8") + b"tR(K\x03" + text(">") + b"tb"),
        "not little-endian",
    ),
    "a numpy number of objects": (
        state_dict(b"cnumpy\ndtype\n(" + text("O8") + b"tR"),
        "unknown numpy dtype",
    ),
    "bytes in another encoding": (
        state_dict(b"c_codecs\nencode\n(" + text("x") + text("rot13") + b"tR"),
        "oddly encoded",
    ),
    "a conjugate tensor": (
        state_dict(tensor((1,), (1,), 1)[:-2] + b"}" + text("conj") + b"\x88stR"),
        "conjugate",
    ),
    "a parameter of no tensor": (
        state_dict(b"ctorch._utils\n_rebuild_parameter\n(NN}tR"),
        "a parameter without a tensor",
    ),
    "a tensor of a dtype that is a text": (
        state_dict(tensor((1,), (1,), 1).replace(b"_v2", b"_v3")[:-2] + text("float16") + b"tR"),
        "a tensor of an unknown dtype",
    ),
    "a tensor rebuilt by rebuilding": (
        state_dict(b"ctorch._tensor\n_rebuild_from_type_v2\n(ctorch._tensor\n_rebuild_from_type_v2\nN)}tR"),
        "made in an unknown way",
    ),
    "a memo index that was never set": (b"\x80\x02}r\xff\xff\xff\xffj\xfe\xff\xff\xff.", "damaged"),
    "a dict that holds itself": (b"\x80\x02}q\x00" + text("a") + b"h\x00s.", "nested too deeply"),
    "a list that holds itself": (state_dict(b"]q\x00h\x00a"), "nested too deeply"),
    "shared parts, doubled 40 times": (
        b"\x80\x02}"
        + text("x")
        + b"(]q\x00"
        + b"".join(b"]q%c(h%ch%ce" % (i + 1, i, i) for i in range(40))
        + b"ts.",
        "nested too deeply",
    ),
    "shared parts, doubled 30 times, round a tensor": (
        b"\x80\x02}"
        + text("x")
        + b"(]q\x00"
        + tensor((1,), (1,), 1)
        + b"a"
        + b"".join(b"]q%c(h%ch%ce" % (i + 1, i, i) for i in range(30))
        + b"ts.",
        "nested too deeply",
    ),
    "a key nested 100000 deep": (b"\x80\x02})" + b"\x85" * 100_000 + b"Ns.", "a container is used as a key"),
    "a stack that runs out": (b"\x80\x02R.", "damaged"),
    "no end": (b"\x80\x02}", "damaged"),
    "values left over": (b"\x80\x02}}.", "left over"),
    "a mark as a value": (b"\x80\x02(.", "damaged"),
    "an unknown protocol": (b"\x80\x09}.", "protocol"),
    "pairs that do not pair": (b"\x80\x02}(Nu.", "damaged"),
    "an item for a dict": (b"\x80\x02}Na.", "only a list takes items"),
    "a tensor out of thin air": (
        state_dict(b"ctorch._utils\n_rebuild_tensor_v2\n(NK\x00))tR"),
        "without a storage",
    ),
    "a storage that is no storage": (state_dict(text("os.system") + b"Q"), "no storage"),
    "a container as an ordered key": (state_dict(b"ccollections\nOrderedDict\n(]()NtatR"), "damaged"),
}
