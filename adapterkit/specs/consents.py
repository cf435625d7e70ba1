"""The losses that a user can consent to: what `--allow NAME` permits."""

from __future__ import annotations

CONSENTS: dict[str, str] = {
    "unclaimed": "leave out tensors that nothing explains",
    "incomplete": "leave out tensors that make no whole change, such as an up without its down",
    "untranslatable": "leave out modules that the target has no name or no form for",
    "absent": "leave out changes of weights that the base model does not have",
    "passengers": "leave out tensors that travel along and that the target does not know",
    "magnitude": "write a DoRA as plain LoRA, without its magnitudes: another change",
    "nonfinite": "write numbers that are not finite as they are",
    "precision": "accept what the requested dtype loses",
}
