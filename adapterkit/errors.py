"""The errors of adapterkit.

AdapterkitError            exit code
├─ SpecError          2    a file under formats/ is wrong
├─ UsageError         2    the request itself makes no sense (two sources for one option, unknown format)
├─ StoreError         2    a file cannot be read or written
│  └─ UnsafeFile      2    reading it would run code, or trust a path that leaves its folder
├─ Unrecognized       2    no family and layout explain the file
│  └─ Ambiguous       2    two explain it equally well
├─ Refused            1    possible, but not without the user's consent
│  ├─ Untranslatable  1    the target has no name for a tensor
│  └─ Unrepresentable 1    exact, but not in this form
├─ Conflict           1    two sources inside the input disagree (scale, duplicate modules)
├─ Mismatch           2    shapes disagree
└─ VerificationFailed 3    what was written is not what was asked for: our bug

Each carries a stable `code`, a `hint` (what to do) and `details` (JSON-ready facts), so that the
command line, JSON output and library callers say the same thing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import ClassVar, Self, Union

Json = Union[str, int, float, bool, None, list["Json"], dict[str, "Json"]]


class AdapterkitError(Exception):
    """Base of every error a caller may want to catch.

    `code` names the cause and is stable between releases; `hint` says what to do about it;
    `details` holds the facts as JSON values.
    """

    exit_code: ClassVar[int] = 2
    default_code: ClassVar[str] = "error"

    def __init__(
        self,
        message: str,
        *,
        code: str | None = None,
        hint: str = "",
        details: Mapping[str, Json] | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = code or self.default_code
        self.hint = hint
        self.details: dict[str, Json] = dict(details or {})

    def at(self, where: str) -> Self:
        """This error, its message beginning with where it happened if it does not yet."""
        if not self.message.startswith(where):
            self.message = f"{where}: {self.message}"
            self.args = (self.message,)
        return self

    def as_json(self) -> dict[str, Json]:
        return {
            "error": type(self).__name__,
            "code": self.code,
            "message": self.message,
            "hint": self.hint,
            "details": self.details,
        }


@contextmanager
def located(where: str) -> Iterator[None]:
    """Let the message of every error from inside begin with where it happened."""
    try:
        yield
    except AdapterkitError as error:
        error.at(where)
        raise


class SpecError(AdapterkitError):
    """`unet_sdxl.toml: naming `ldm`: `input_blocks.4.1` is spelled twice`"""

    default_code = "spec"


class UsageError(AdapterkitError):
    """`no format is called `kohia`; did you mean `kohya`?`"""

    default_code = "usage"


class StoreError(AdapterkitError):
    """`style.safetensors: cut short: the header promises 239075328 bytes, the file has 12582912 (5 %)`"""

    default_code = "store"


class UnsafeFile(StoreError):
    """`old.pt: refused: its pickle would call `os.system``"""

    default_code = "unsafe"


class Unrecognized(AdapterkitError):
    """`x.safetensors: nothing explains it; nearest: sdxl as kohya, 3 % of 812 tensors`"""

    default_code = "unrecognized"


class Ambiguous(Unrecognized):
    """`te.safetensors: sdxl and flux1 explain all 216 tensors equally; say --family`"""

    default_code = "ambiguous"


class Refused(AdapterkitError):
    """Possible only with loss; nothing is lost without a named consent (`--allow NAME`)."""

    exit_code = 1
    default_code = "refused"


class Untranslatable(Refused):
    """`12 tensors have no name in `xlabs`: `img_in` …; --allow untranslatable leaves them out`"""

    default_code = "untranslatable"


class Unrepresentable(Refused):
    """`rows 0:3072 cut through a Kronecker block of 576; --as lora expands it exactly`"""

    default_code = "unrepresentable"


class Conflict(AdapterkitError):
    """``x.to_q`: scale 0.5 from `.alpha`, 2.0 from adapter_config.json; say --scale-from`"""

    exit_code = 1
    default_code = "conflict"


class Mismatch(AdapterkitError):
    """``x.to_q`: up is 320x16 but down has rank 8`"""

    default_code = "mismatch"


class VerificationFailed(AdapterkitError):
    """What was written does not make the change that was asked for; the output was not kept."""

    exit_code = 3
    default_code = "verification"
