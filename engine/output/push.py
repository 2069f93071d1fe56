"""Upload of a merge to the hub of Hugging Face by huggingface_hub: the files that the merge wrote, in one commit.

No path of this machine is uploaded: the config names models and files, files with paths stay here, and so does what
others have put into the folder.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from engine.checkpoints.find import CARD, check_inside
from engine.config.mergekit_yaml import as_yaml
from engine.config.reader import parse_config, read_recorded
from engine.errors import ConfigError, OutputError, RunError
from engine.output.card import PLACE
from engine.output.names import dump, public_config
from engine.run.contents import is_as_written, names_of, read_manifest
from engine.run.ownership import RECORD, is_inside
from engine.storage.cache import fetch
from engine.storage.local_folder import LocalFolder
from engine.storage.paths import is_uri, locate
from engine.untrusted import shown

# Files of an output that name paths of this machine, or describe the files as they are on it.
HERE = {"merge/identity.json", "merge/documents.json", "merge/files.json", "merge/evaluation.parquet", RECORD}
# Rewritten by `report`, which knows it by a mark: uploaded as the merge wrote it, or not at all.
REPORT = "merge/report.html"
# Keys of a model's JSON files in which libraries write where they found it.
PATHS = {"_name_or_path", "name_or_path", "tokenizer_file", "vocab_file", "merges_file", "special_tokens_map_file"}
# Files of an earlier upload that transformers would load beside those of another.
_WEIGHTS = re.compile(r"(.*/)?model(-\d+-of-\d+)?\.safetensors(\.index\.json)?")
_NEW = {".gitattributes", CARD}


def check_target(name: str) -> None:
    """Check that the token of this machine can upload a merge to the repository `name` on the hub.

    Raises:
        ConfigError: the name is no OWNER/NAME, there is no token, it cannot write there, or the repository holds
            something other than a merge.
        RunError: the hub cannot be reached.
    """
    from huggingface_hub import HfApi, constants, get_token
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

    bad = ConfigError(f"{shown(repr(name))} is no name of a repository on the hub", "the hub", "OWNER/NAME")
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name, re.ASCII):
        raise bad
    if constants.is_offline_mode():
        raise ConfigError("HF_HUB_OFFLINE is set", "the hub", do="unset HF_HUB_OFFLINE")
    if get_token() is None:
        what = "there is no token for the hub"
        raise ConfigError(what, "HF_TOKEN", "a token that can write", "set HF_TOKEN, or run `hf auth login`")
    api = HfApi()
    with _hub_errors("check the connection and the token in HF_TOKEN"):
        user = api.whoami()
        owners = [user["name"], *(one["name"] for one in user.get("orgs", ()))]
        role = user.get("auth", {}).get("accessToken", {}).get("role")
        try:
            there = set(api.list_repo_files(name))
        except RepositoryNotFoundError:
            there = set()
        except HFValidationError as error:
            raise bad from error
    owner = name.partition("/")[0]
    if owner.lower() not in map(str.lower, owners):
        raise ConfigError(f"the token cannot write to {owner}", "the hub", f"one of {', '.join(owners)} as the owner")
    if role == "read":
        raise ConfigError("the token can only read", "the hub", do="set HF_TOKEN to a token that can write")
    if there - _NEW and RECORD not in there:
        what = f"the repository holds something other than a merge: {names_of(sorted(there - _NEW))}"
        raise ConfigError(what, name, do="give another name")


def push(
    out: str,
    name: str,
    say: Callable[[str], None],
    public: bool = False,
    license_id: str = "",
    bases: Sequence[str] = (),
) -> str:
    """Upload the output of a merge, which `check_target` has allowed, and return the address of its page.

    Args:
        out: The output, a path or a URI; one in object storage is copied into the cache of this machine.
        name: The repository, which is created if there is none.
        say: Called with lines for the user: what the card lacks.
        public: Whether others can see a new repository.
        license_id: The license in the front matter of the card, as the hub calls it. Empty: as in the output's card.
        bases: The hub's ids of base and experts in that front matter. Empty: as in the output's card.

    Raises:
        ConfigError: `out` is no output of a merge.
        OutputError: a file of the merge is missing, or is not as it was written.
        RunError: the hub refuses the upload or cannot be reached; the repository has all files or none of them.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    folder = LocalFolder(fetch(out, None, ConfigError) if is_uri(out) else locate(out, Path.cwd(), ConfigError))
    files: dict[str, bytes | Path] = {one: _content(folder, one) for one in uploaded(folder)}
    files[RECORD] = neutral_config(folder.path / RECORD)
    if CARD in files:
        files[CARD] = _card(folder, name, say, license_id, bases)
    api = HfApi()
    with _hub_errors("run the same command again; files that the hub has are not sent twice"), _quiet():
        page = str(api.create_repo(name, private=not public, exist_ok=True))
        old = [one for one in api.list_repo_files(name) if _WEIGHTS.fullmatch(one) and one not in files]
        added = [CommitOperationAdd(one, content) for one, content in sorted(files.items())]
        removed = [CommitOperationDelete(one) for one in old]
        api.create_commit(name, [*added, *removed], commit_message="Upload a merge made with expert-merging")
    return page


def uploaded(folder: LocalFolder) -> list[str]:
    """Return the names of the files of an output that are uploaded as they are, or nearly so.

    Raises:
        ConfigError: the folder is not the output of a merge.
        OutputError: a file is missing, or is not as the merge wrote it.
    """
    written = read_manifest(folder)
    if not folder.exists(RECORD) or not written or not all(map(is_inside, written)):
        raise ConfigError("not the output of a merge", folder.where, f"a folder that contains {RECORD}")
    for name in (RECORD, *written):
        check_inside(folder.path / name, folder.path, OutputError)
    names = [name for name in written if name not in HERE]
    changed = [name for name in names if not is_as_written(folder, name, written[name])]
    if REPORT in changed:  # another report of the merge, or none
        changed.remove(REPORT)
        names.remove(REPORT)
    if changed:
        raise OutputError(
            f"files of the merge are missing or were changed since: {names_of(sorted(changed))}",
            folder.where,
            "the files as the merge wrote them, which alone are uploaded",
            "restore them, or merge again into another folder, and push that",
        )
    return names


def neutral_config(path: Path) -> bytes:
    """Return a merge/config.yaml that names models and files without their folders."""
    raw = read_recorded(path)
    record = raw.pop("record", {})
    kept = {key: record[key] for key in ("date", "versions", "priors") if key in record}
    return dump(as_yaml(public_config(parse_config(raw, path))) | {"record": kept}).encode()


def _card(folder: LocalFolder, name: str, say: Callable[[str], None], license_id: str, bases: Sequence[str]) -> bytes:
    """Return the card with the name of the repository in its commands, and the given front matter."""
    from huggingface_hub import ModelCard

    card = ModelCard(folder.read(CARD).decode().replace(PLACE, name))
    front: Any = card.data
    if license_id:
        front.license, front.license_name, front.license_link = license_id, None, None
    if bases:
        front.base_model, front.base_model_relation = list(bases), "merge"
    for key, option in (("license", "--license"), ("base_model", "--base-model")):
        if not getattr(front, key, None):
            say(f"the card names no `{key}`: set it with `push OUT OWNER/NAME {option} …`, or on the hub")
    return str(card).encode()


def _content(folder: LocalFolder, name: str) -> bytes | Path:
    """Return a file's path, or its content if it is JSON that names paths."""
    path = folder.path / name
    if Path(name).name not in ("config.json", "tokenizer_config.json", "generation_config.json"):
        return path
    values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    kept = {key: value for key, value in values.items() if key not in PATHS}
    return path if kept == values else (json.dumps(kept, indent=2, ensure_ascii=False) + "\n").encode()


@contextmanager
def _hub_errors(do: str) -> Iterator[None]:
    """Raise RunError for what huggingface_hub raises when the hub refuses a request or cannot be reached."""
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined] # of the library that it builds on

    try:
        yield
    except (HTTPError, OSError, ValueError, RuntimeError) as error:
        # The upload of a file fails with a RuntimeError, whose cause tells why.
        cause = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ else error
        first = next(iter(str(cause).strip().splitlines()), type(cause).__name__)
        raise RunError(f"the hub cannot be used: {first}", "the hub", do=do) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Leave out a warning that a model has parquet files, which hold its coefficients."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*commit a data file")
        yield
