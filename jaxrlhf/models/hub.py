"""Models and rows of the Hugging Face hub, by name: ``org/name`` or ``org/name@revision``.

The network is asked at the beginning alone (``fetch``): what is there then has a name with its
commit, such as ``org/name@0123…``, which a run writes down, and which stands for a folder of the
hub's cache (``local``) from then on. A file or folder of that name here goes first. Only tables,
texts and safetensors are taken; nothing is unpickled, and no code of a repository is run.
``HF_HUB_OFFLINE``, ``HF_HOME``, ``HF_TOKEN`` and ``HF_ENDPOINT`` are the hub's own variables.
"""

import dataclasses
import fnmatch
import os
import re
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import huggingface_hub  # what is asked of it is imported then

from jaxrlhf.config import Config, ModelConfig, load
from jaxrlhf.core import remote
from jaxrlhf.core.errors import InputError
from jaxrlhf.core.files import is_url
from jaxrlhf.core.shown import one_line, shown
from jaxrlhf.models.hf_config import read_object

T = TypeVar("T")

_NAME = re.compile(r"([\w-][\w.-]*/[\w-][\w.-]*)(?:@([\w./-]+))?", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")

ADAPTER = "adapter_config.json"
"""What the folder of an adapter has, of the package peft, beside its weights."""

WANTED = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
    "special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "chat_template.json",
    "model*.safetensors", "model.safetensors.index.json",
    "adapter_config.json", "adapter_model.safetensors",
)  # fmt: skip
"""Files of a repository that are read, where they are there."""

HEADER = ("config.json", ADAPTER)
"""Those of them that say what the others are; a plan reads no more."""


def split_name(path: str) -> tuple[str, str] | None:
    """(repository, revision or "") of the name of one; None if ``path`` cannot be that, or is a
    file or folder here."""
    match = _NAME.fullmatch(path)
    if match is None or path.endswith(".gguf") or os.path.exists(path):
        return None
    return match[1], match[2] or ""


def local(path: str) -> str:
    """The folder of the hub's cache that a name stands for, or the copy that a URL does; ``path``
    itself if it is neither, or ``fetch`` has not brought it. Asks no network."""
    if is_url(path):
        return remote.here(path)
    named = split_name(path)
    if named is None:
        return path
    try:
        return huggingface_hub.snapshot_download(
            named[0],
            revision=named[1] or None,
            allow_patterns=list(HEADER),  # a part will do: what is missing, its reader says
            local_files_only=True,
        )
    except OSError:
        return path


def fetch(path: str, files: tuple[str, ...] = WANTED) -> str:
    """Bring a repository into the hub's cache; its name with the commit that it is at.

    Of an adapter, here or there, the base is brought too. A URL is copied here, and stays the name
    of its copy; of a run's folder, its config and its newest checkpoint.

    What is no name of a repository comes back as it is, and so does one that is at hand with its
    commit.

    Raises:
      InputError: it cannot be had: there is none, it asks for a token, or there is no network and
        the cache has it not.
    """
    if is_url(path):
        remote.fetch("path", path, partial(_wanted, files=files))
        _fetch_start(path, files)
    named = split_name(path)
    if named is None:
        if is_adapter(path):
            fetch(base_of(path), files)
        return path
    repository, revision = named
    try:
        folder = huggingface_hub.snapshot_download(
            repository, revision=revision or None, allow_patterns=list(files)
        )
    # Whatever the library, its HTTP client or the disk raise; their texts are many lines long.
    except Exception as error:
        raise InputError(
            f"{shown(path, 200)}: no file or folder here, and the hub does not give it "
            f"({reason(error)}): check the name; where there is no network, run `hf download "
            f"{repository}` where there is one, and give the folder that it prints"
        ) from None
    found = f"{repository}@{Path(folder).name}"
    if is_adapter(found):
        fetch(base_of(found), files)
    return found


def _fetch_start(path: str, files: tuple[str, ...]) -> None:
    """Bring what a run that was brought has started from, if that is elsewhere too."""
    config = Path(local(path)) / "config.yaml"
    if not config.is_file():
        return
    model = load(config).model
    for start in {model.path, model.tokenizer} - {path}:
        # What is here already has brought its own start: runs in a ring end.
        if (is_url(start) and local(start) == start) or split_name(start):
            fetch(start, files)


def _wanted(names: list[str], files: tuple[str, ...]) -> list[str]:
    """Of the names in a folder, those that are read of a model, or of a run."""
    found = [name for name in names if any(fnmatch.fnmatch(name, x) for x in files)]
    if "config.yaml" not in names:
        return found
    # A plan reads no weights.
    return [*found, "config.yaml", *(remote.newest_of(names) if files == WANTED else ())]


def is_adapter(path: str) -> bool:
    """Whether ``path`` is a folder of peft's, an adapter."""
    return bool(path) and os.path.isfile(os.path.join(local(path), ADAPTER))


def adapts_scorer(path: str) -> bool:
    """Whether an adapter is that of a reward model."""
    return adapter_config(path).get("task_type") == "SEQ_CLS"


def base_of(path: str) -> str:
    """The path, or the name and revision, of the model that an adapter is for.

    Raises:
      InputError: adapter_config.json is malformed, or names none.
    """
    config = adapter_config(path)
    base, revision = config.get("base_model_name_or_path"), config.get("revision")
    if not isinstance(base, str) or not base or not isinstance(revision, str | None):
        where = Path(local(path)) / ADAPTER
        raise InputError(
            f"{where}: base_model_name_or_path={shown(base)}: give the folder of the model that "
            "the adapter is for"
        )
    return f"{base}@{revision}" if revision and not os.path.exists(base) else base


def adapter_config(path: str) -> dict[str, Any]:
    """What an adapter's adapter_config.json says."""
    return read_object(Path(local(path)) / ADAPTER)


def reason(error: Exception) -> str:
    """What the hub's library says by an error, in a few words."""
    # Each is a case of the next.
    known = {
        "GatedRepoError": "it is gated: ask for access on its page, and set HF_TOKEN",
        "RepositoryNotFoundError": "it has no such repository, or a private one: set HF_TOKEN",
        "RevisionNotFoundError": "the repository has no such revision",
        "LocalEntryNotFoundError": "it cannot be reached, and the cache has it not",
        "OfflineModeIsEnabled": "HF_HUB_OFFLINE is set, and the cache has it not",
    }
    for kind in type(error).__mro__:
        if kind.__name__ in known:
            return known[kind.__name__]
    return one_line(error)


def fetch_all(config: Config) -> Config:
    """The config with all its networks at hand, those of the hub by their commits.

    A run that goes on takes the commits that it began with, unless its config names others.
    """
    before = ""
    if is_url(config.output):
        before = remote.read_text("output", f"{config.output.rstrip('/')}/config.yaml")
    elif (saved := Path(config.output) / "config.yaml").is_file():
        before = saved.read_text(encoding="utf-8", errors="replace")

    def at_hand(path: str) -> str:
        named = split_name(path)
        if named is None:
            return fetch(path)
        begun = re.search(rf"\b{re.escape(named[0])}@({_COMMIT.pattern})\b", before)
        return fetch(f"{named[0]}@{begun[1]}" if begun and not named[1] else path)

    def changed(part: Any, *names: str) -> Any:
        return dataclasses.replace(part, **{name: at_hand(getattr(part, name)) for name in names})

    def judges(rewards: Any) -> Any:
        return tuple(
            dataclasses.replace(changed(x, "model"), ensemble=tuple(map(at_hand, x.ensemble)))
            for x in rewards
        )

    return dataclasses.replace(
        config,
        model=dataclasses.replace(
            changed(config.model, "path", "tokenizer"),
            lora=config.model.lora and changed(config.model.lora, "path"),
        ),
        critic=changed(config.critic, "path"),
        reference=changed(config.reference, "path"),
        rewards=judges(config.rewards),
        eval=dataclasses.replace(config.eval, gold=judges(config.eval.gold)),
    )


def fetch_fields(record: T, *names: str) -> T:
    """A dataclass with these fields of it, paths, at hand."""
    whole: Any = record
    return dataclasses.replace(whole, **{name: fetch(getattr(record, name)) for name in names})


def fetch_shape(model: ModelConfig) -> ModelConfig:
    """The model, of the hub its config.json alone (and all of an adapter): what a plan reads."""
    lora = model.lora and dataclasses.replace(model.lora, path=fetch(model.lora.path, WANTED))
    return dataclasses.replace(model, path=fetch(model.path, HEADER), lora=lora)


def check_name(field: str, repository: str) -> None:
    """Raise InputError unless it is the name of a repository, without a revision."""
    match = _NAME.fullmatch(repository)
    if match is None or match[2]:
        raise InputError(f"{field}={shown(repository, 200)}: no name of a repository: org/name")


def push_folder(folder: str, repository: str) -> str:
    """Upload a folder as a model; the address of what was made of it.

    The repository is made, private, if it is not there.

    Raises:
      InputError: no token, no network, or no right to write there.
    """
    hub = huggingface_hub.HfApi()
    try:
        hub.create_repo(repository, private=True, exist_ok=True)
        done = hub.upload_folder(repo_id=repository, folder_path=folder)
    except Exception as error:
        raise InputError(
            f"--push {repository}: {reason(error)}: {folder} is whole; log in by `hf auth "
            f"login`, or set HF_TOKEN, and `hf upload {repository} {folder}`"
        ) from None
    return str(done.commit_url)
