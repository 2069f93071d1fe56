"""One config through mergekit and through this engine, both in this process, as it is and in float32.

The engine runs below Ray: shards as plain objects combine the tensors as `cluster.weight_space_merge` has them do.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import re
import shutil
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml
from weight_space import combine

from engine.checkpoints.find import ROOT, find_model
from engine.config.documents import read_documents, with_models
from engine.errors import MergeError
from engine.output.model_folder import output_files, write_companions
from engine.output.outline import outlined
from engine.planning.open_models import base_folder
from engine.planning.plan import Plan
from engine.planning.planner import make_plan
from engine.shards.settings import check_settings

# Folders of a result below WORK/SIDE/CONFIG: as the config has it, and computed and written in float32.
AS_IS, FLOAT32 = "as_is", "float32"


@dataclass(frozen=True)
class Outcome:
    """Whether a config was merged; if not, what the program said, and whether that was an error of its own."""

    ok: bool
    said: str = ""
    fault: bool = False


def of_mergekit(config: Path, tool: str, work: Path) -> Outcome:
    """Merge a config by mergekit into `work`, unless an earlier call did, and return how that ended.

    `tool`: `yaml`, `multi` (several documents), or `moe`.
    """
    note = work / "outcome.json"
    if note.exists():
        return Outcome(**json.loads(note.read_text(encoding="utf-8")))
    text = config.read_text(encoding="utf-8")
    run = {"yaml": _merge, "multi": _merge_all, "moe": _build_moe}[tool]
    outcome = Outcome(True)
    try:
        with quiet(), contextlib.chdir(config.parent):
            run(text, work / AS_IS)
            if tool != "moe":
                _twice(text, work, lambda: run(in_float32(text), work / FLOAT32))
    # mergekit raises what its libraries raise, and ends the process where its moe builder refuses.
    except (Exception, SystemExit) as error:  # noqa: BLE001
        outcome = Outcome(False, f"{type(error).__name__}: {error}".splitlines()[0])
        shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True, exist_ok=True)
    note.write_text(json.dumps(asdict(outcome)), encoding="utf-8")
    return outcome


def of_engine(config: Path, work: Path) -> Outcome:
    """Merge a config by this engine into `work`, and return how that ended."""
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    in_full = config.with_name(f".{config.stem}.float32.yaml")
    try:
        with quiet():
            merge(config, work / AS_IS)
            text = config.read_text(encoding="utf-8")
            in_full.write_text(in_float32(text), encoding="utf-8")
            _twice(text, work, lambda: merge(in_full, work / FLOAT32))
    except MergeError as error:
        return Outcome(False, str(error))
    except Exception as error:  # noqa: BLE001 - no refusal, but a defect, which the table has to show
        return Outcome(False, f"{type(error).__name__}: {error}", fault=True)
    finally:
        in_full.unlink(missing_ok=True)
    return Outcome(True)


def _twice(text: str, work: Path, again: Callable[[], None]) -> None:
    """Merge again in float32, unless the config is in float32 and the result is there."""
    if all(one.get("dtype") == "float32" and "out_dtype" not in one for one in yaml.safe_load_all(text)):
        (work / FLOAT32).symlink_to(AS_IS)
    else:
        again()


def merge(config: Path, folder: Path) -> None:
    """Merge a config by this engine into a folder; of several documents, the last one.

    Raises:
        MergeError: the engine refuses the config.
    """
    documents = read_documents(config)
    places = {one.name: f"{folder}.{one.name}" for one in documents if one.name is not None}
    with outlined(documents, config.parent):
        pass  # as the command line, which plans all merges before the first
    for document in documents:
        place = folder if document.name is None else Path(places[document.name])
        write(make_plan(document.config(places), config.parent), place)


def write(plan: Plan, folder: Path) -> None:
    """Write the output of a plan into a folder, with two shards."""
    check_settings(plan)
    combine(plan, folder, shards=2)
    tokenizer = find_model(plan.tokenizer, ROOT) if plan.tokenizer else None
    write_companions(folder, plan, base_folder(plan), output_files(plan), tokenizer)


def in_float32(text: str) -> str:
    """Return a config with each of its documents computed and written in float32."""
    documents = [one | {"dtype": "float32", "out_dtype": "float32"} for one in yaml.safe_load_all(text)]
    return yaml.safe_dump_all(documents, sort_keys=False)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Drop what is printed, logged and warned of in the context."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        logging.disable(logging.ERROR)
        try:
            with warnings.catch_warnings(action="ignore"):
                yield
        finally:
            logging.disable(logging.NOTSET)


def _options(folder: Path) -> Any:
    from mergekit.options import MergeOptions

    return MergeOptions(
        quiet=True,
        device="cpu",
        write_model_card=False,
        clone_tensors=True,
        random_seed=0,
        lora_merge_cache=str(folder.parent / "lora"),
    )


def _merge(text: str, folder: Path) -> None:
    from mergekit.config import MergeConfiguration
    from mergekit.io.tasks import LoaderCache
    from mergekit.merge import run_merge

    class InOrder(MergeConfiguration):  # type: ignore[misc]
        """A config whose models are in the order of the file.

        Without `base_model`, mergekit takes config.json and tokenizer of the first one of a set, which is another one
        in each process.
        """

        def referenced_models(self) -> list[Any]:
            found = {
                model: re.search(rf"{re.escape(str(model))}(?![\w/.+-])", text) for model in super().referenced_models()
            }
            return sorted(found, key=lambda model: found[model].start())

    LoaderCache().loaders.clear()
    run_merge(InOrder.model_validate(yaml.safe_load(text)), str(folder), _options(folder))


def _merge_all(text: str, folder: Path) -> None:
    """Merge documents that stand in the order of their use, one by one, as mergekit-multi does."""
    places: dict[str, str] = {}
    for number, document in enumerate(yaml.safe_load_all(text)):
        place = folder.with_name(f"{folder.name}.{number}")
        _merge(yaml.safe_dump(with_models(document, places), sort_keys=False), place)
        places[document.get("name", "")] = str(place)
    place.rename(folder)


def _build_moe(text: str, folder: Path) -> None:
    from mergekit.moe.config import MoEMergeConfig
    from mergekit.scripts.moe import build

    build(MoEMergeConfig.model_validate(yaml.safe_load(text)), str(folder), _options(folder))
