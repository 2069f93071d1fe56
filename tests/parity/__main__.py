"""Print which published mergekit configs are accepted, and which give mergekit's merge: `make mergekit-parity`."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from parity.table import index, record, table
from parity.verdicts import verdicts


def main() -> None:
    """Run the configs that the arguments choose."""
    parser = argparse.ArgumentParser(prog="parity", description=__doc__)
    parser.add_argument("configs", nargs="*", help="parts of the names of configs; default: all")
    parser.add_argument(
        "--work", type=Path, default=Path("build/mergekit-parity"), help="models and mergekit's results"
    )
    parser.add_argument("--record", action="store_true", help="store the verdicts, which the tests expect")
    given = parser.parse_args()
    work = given.work.absolute()
    work.mkdir(parents=True, exist_ok=True)
    found = {}
    names = [name for name in index() if not given.configs or any(part in name for part in given.configs)]
    for name, verdict in verdicts(work, names):
        found[name] = verdict
        print(f"{name}: {verdict}", flush=True)
    print(f"\n{table(found)}")
    if given.record:
        record(found)


if __name__ == "__main__":
    main()
