"""Makes fixtures/golden: `python tests/make_golden.py [NAME...]` writes the files of these names.

A golden file is written once and then read for ever, so that what is understood today stays understood.
The names in it are spelled out by hand, as the programs that write such files spell them; the norms
beside it come from `golden_kinds`. Nothing of adapterkit takes part. Writing one again would make the
past agree with the present, so that is refused.
"""

from __future__ import annotations

import sys

import golden_diffusion
import golden_language

GOLDEN = golden_diffusion.GOLDEN | golden_language.GOLDEN

if __name__ == "__main__":
    for name in sys.argv[1:] or GOLDEN:
        GOLDEN[name]().write(name)
