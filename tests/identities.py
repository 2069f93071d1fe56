"""Identities of merges that tests name, and the files by which an output is known as one of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

from engine.run.contents import MANIFEST
from engine.run.identity import Identity
from engine.run.ownership import RECORD, RECORDED_IDENTITY

# What a merge on CPUs keeps of its devices.
ON_CPU = {
    **{"trainer": 0.0, "expert": 0.0, "threads": 2, "kinds": []},
    **{"batch_tokens": 192, "logit_bytes": 1 << 20, "gradients": "accumulate"},
}


def merge_of(name: str) -> Identity:
    """Return the identity of a merge that differs from those of other names in one option."""
    return Identity({"seed": json.dumps(name)}, {}, {})


def record_of(merge: Identity, files: Sequence[str]) -> dict[str, str]:
    """Return the files, by their names, that mark an output as a merge which wrote `files`."""
    content = merge.encode()
    record = {"identity": hashlib.sha256(content).hexdigest(), "files": [*files, RECORDED_IDENTITY, MANIFEST]}
    return {RECORDED_IDENTITY: content.decode(), MANIFEST: "{}", RECORD: json.dumps({"record": record})}
