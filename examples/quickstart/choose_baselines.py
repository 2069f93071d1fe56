"""Compare settings of the demo's baselines on the quickstart's validation examples (never on the test examples).

`python choose_baselines.py` prints the mean exact match and the mean loss over the three skills of each setting. It
takes ten minutes on two cores and is not needed for the quickstart. Expert Merging is not here: it takes the defaults.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from itertools import product
from pathlib import Path

from demo import CONFIG, ROOT
from scoring import score
from skills import SKILLS
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

SETTINGS = [
    *(f"merge_method=task_arithmetic parameters.weight=1 parameters.lambda={scale}" for scale in (0.4, 0.6, 0.8)),
    *(
        f"merge_method=ties parameters.weight=1 parameters.density={density} parameters.lambda={scale}"
        for density, scale in product((0.2, 0.5), (1.0, 1.5, 2.0))
    ),
    *(f"merge_method=svd parameters.lambda={scale}" for scale in (0.6, 0.8, 1.0, 1.3)),
]


def main() -> None:
    """Merge by every setting, and print its scores."""
    logging.disable_progress_bar()
    for setting in SETTINGS:
        overrides = [part for override in setting.split() for part in ("--set", override)]
        with tempfile.TemporaryDirectory() as scratch:
            out = Path(scratch, "out")
            command = [sys.executable, ROOT / "cli.py", "merge", CONFIG, "--out", out, *overrides]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            model, tokenizer = AutoModelForCausalLM.from_pretrained(out).eval(), AutoTokenizer.from_pretrained(out)
            scores = [score(model, tokenizer, skill, "validation") for skill in SKILLS]
        match, loss = (sum(getattr(one, of) for one in scores) / len(scores) for of in ("exact_match", "loss"))
        each = ", ".join(f"{skill} {one.exact_match:.0f}" for skill, one in zip(SKILLS, scores, strict=True))
        print(f"{setting}: {match:.1f} % loss {loss:.3f} ({each})", flush=True)


if __name__ == "__main__":
    main()
