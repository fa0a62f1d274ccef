"""Where rows come from: files, folders, globs, dataset ids -> rows with an address (source, file, line)."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import glob
import hashlib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from itune.data.arrow import plain_row, read_parquet
from itune.data.jsonl import read_json_array, read_jsonl
from itune.storage.bucket import is_url
from itune.storage.fetch import local_files
from itune.types import Address, InputError

SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".json.gz", ".jsonl.zst", ".json.zst", ".parquet")

_SPLITS = {"train": {"train", "training"}, "validation": {"validation", "valid", "val", "dev"},
           "test": {"test", "testing", "eval", "evaluation"}}  # as the hub names files; folders of them too


class Row(NamedTuple):
    """One record as it stands in its source: field name -> value."""

    address: Address
    fields: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Source:
    """A named set of rows: `files` on disk, or `identifier` of a Hugging Face or TFDS dataset.

    Of a bucket the files are copies here, `spec` is the URL, and `urls` those of the files: rows are addressed by them.
    """

    name: str
    spec: str
    files: tuple[str, ...] = ()
    kind: str = "files"  # files | saved | hub | tfds
    urls: tuple[str, ...] = ()

    @property
    def places(self) -> tuple[str, ...]:
        """What addresses of rows call the files."""
        return self.urls or self.files

    def rows(self) -> Iterator[Row]:
        """Every row in order. Raises InputError with file and line for what cannot be read."""
        if self.kind == "files":
            for file, place in zip(self.files, self.places, strict=True):
                yield from _read_file(self.name, file, place)
        else:
            opened = _open_dataset(self)
            features = opened.features.to_dict() if getattr(opened, "features", None) else None
            for index, fields in enumerate(opened):
                yield Row(Address(self.name, self.spec, index + 1), plain_row(fields, features))

    def digest(self) -> str:
        """Hash of the content: of every file's bytes, or what the dataset library calls its fingerprint."""
        hasher = hashlib.sha256(f"{self.name}\0{self.kind}".encode())
        if self.kind == "files":
            for file in self.files:
                hasher.update(f"\0{Path(file).name}\0".encode())
                with open(file, "rb") as stream:
                    hasher.update(hashlib.file_digest(stream, "sha256").digest())
        else:
            hasher.update(_dataset_version(self).encode())
        return hasher.hexdigest()


def open_sources(spec: Any, key: str = "data.train") -> list[Source]:
    """The sources that a config value names: text, a tuple of texts, or a dict name -> text.

    Names are unique: file stems, made longer by their folder where two are alike. Raises InputError for a missing file
    (with the nearest name), an empty folder, or an unknown kind of file.
    """
    if isinstance(spec, Mapping):
        return [_open(str(name), text, f"{key}.{name}") for name, text in spec.items()]
    texts = [spec] if isinstance(spec, str) else list(spec)
    texts = [text for text in texts if text]
    if not texts:
        raise InputError(f"{key} is empty; expected a file, a folder, a glob or a dataset id")
    names = [_short_name(text) for text in texts]
    if len(set(names)) < len(names):
        names = texts
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise InputError(f"{key} names {twice} twice")
    return [_open(name, text, key) for name, text in zip(names, texts)]


def _short_name(text: str) -> str:
    name = text.rstrip("/").rsplit("/", 1)[-1]
    for suffix in sorted(SUFFIXES, key=len, reverse=True):
        name = name.removesuffix(suffix)
    return name or text


def _open(name: str, text: Any, key: str) -> Source:
    if not isinstance(text, str):
        raise InputError(f"{key} must be text that names a file or a dataset, found {type(text).__name__} {text!r}")
    if text.startswith("tfds:"):
        return Source(name, text, kind="tfds")
    if is_url(text):
        copies = local_files(text, SUFFIXES, key)
        return Source(name, text, tuple(copies), urls=tuple(copies.values()))
    path = Path(text).expanduser()
    if path.is_file():
        return Source(name, text, (_known(path, key),))
    if path.is_dir():
        if (path / "state.json").exists() or (path / "dataset_dict.json").exists():
            return Source(name, text, kind="saved")
        found = [p.relative_to(path) for p in path.rglob("*") if p.is_file() and p.name.endswith(SUFFIXES)]
        files = sorted(str(path / p) for p in found if not any(part.startswith(".") for part in p.parts))
        if not files:
            raise InputError(f"{key}: folder {text} has no file that ends in {', '.join(SUFFIXES)}")
        _check_splits(path, files, key)
        return Source(name, text, tuple(files))
    if any(sign in text for sign in "*?["):
        files = sorted(glob.glob(str(path), recursive=True))
        if not files:
            raise InputError(f"{key}: no file matches {text}{_nearest_file(path)}")
        return Source(name, text, tuple(_known(Path(file), key) for file in files))
    if _looks_like_path(text):
        raise InputError(f"{key}: no such file {text}{_nearest_file(path)}")
    return Source(name, text, kind="hub")


def _check_splits(folder: Path, files: list[str], key: str) -> None:
    """Raise InputError where a folder's names say that some of its files are to train on and others to judge by."""
    splits: dict[str, str] = {}
    for file in files:
        words = re.findall("[a-z]+", str(Path(file).relative_to(folder)).lower())
        splits.setdefault(next((split for split, names in _SPLITS.items() if names & set(words)), ""), file)
    if len(splits.keys() - {""}) > 1:
        shown = "; ".join(f"{split}: {file}" for split, file in splits.items() if split)
        raise InputError(f"{key}: folder {folder} holds several splits ({shown}); name the files that are meant, "
                         "with * for several")


def _looks_like_path(text: str) -> bool:
    if text.endswith(SUFFIXES) or text[:1] in "./~" or "\\" in text:
        return True
    hub_id = re.fullmatch(r"[\w.-]+(/[\w.-]+)?(:[\w.\[\]%-]+)?", text)
    return hub_id is None or Path(text).suffix in (".csv", ".txt", ".tsv", ".gz", ".zst", ".yaml", ".xlsx")


def _known(path: Path, key: str) -> str:
    if not path.name.endswith(SUFFIXES):
        raise InputError(f"{key}: {path} ends in {path.suffix or 'nothing'}; expected one of {', '.join(SUFFIXES)}")
    return str(path)


def _nearest_file(path: Path) -> str:
    """A hint: the file most like a missing one in its folder, or the nearest folder above that exists."""
    folder = path.parent
    if not folder.is_dir():
        while not folder.is_dir():
            folder = folder.parent
        return f"; folder {path.parent} does not exist (nearest folder that does: {folder})"
    names = [p.name for p in folder.iterdir() if p.name.endswith(SUFFIXES) or p.is_dir()]
    near = difflib.get_close_matches(path.name, names, n=1, cutoff=0.4)
    return f"; nearest: {folder / near[0]}" if near else f"; {folder} has no data file of a similar name"


def _read_file(source: str, file: str, place: str) -> Iterator[Row]:
    if file.endswith(".parquet"):
        reader = read_parquet(file)
    elif ".jsonl" in Path(file).name[-10:]:
        reader = read_jsonl(file)
    else:
        reader = read_json_array(file)
    for line, fields in reader:
        yield Row(Address(source, place, line), fields)


def _dataset_version(source: Source) -> str:
    """What stands for a dataset's content: its library's fingerprint, or its name with version and split."""
    if source.kind == "tfds":
        tfds, name, split = _tfds(source)
        return f"{tfds.builder(name).info.full_name}:{split}"
    return str(_open_dataset(source)._fingerprint)


def _tfds(source: Source) -> tuple[Any, str, str]:
    """(library, name, split) of `tfds:name[:split]`."""
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise InputError(f"{source.spec} needs the extra: pip install 'itune[tfds]'") from error
    name, _, split = source.spec.removeprefix("tfds:").partition(":")
    return tfds, name, split or "train"


def _open_dataset(source: Source) -> Any:
    """The dataset behind `owner/name[:split]`, a saved folder or `tfds:name[:split]`; train is the default split."""
    if source.kind == "tfds":
        tfds, name, split = _tfds(source)
        return tfds.as_numpy(tfds.load(name, split=split, shuffle_files=False))
    import datasets

    try:
        if source.kind == "saved":
            found = datasets.load_from_disk(source.spec)
        else:
            name, _, split = source.spec.partition(":")
            found = _from_hub(name, split or "train")
    except Exception as error:  # the library raises a dozen kinds: no network, no such id, no such split, bad files
        detail = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        raise InputError(f"dataset {source.spec} cannot be opened ({detail}); expected a file, a saved dataset folder, "
                         "or a hub id that is reachable or already in the local cache") from error
    if isinstance(found, dict):
        if "train" not in found:
            raise InputError(f"dataset {source.spec} has the splits {', '.join(found)}; "
                             f"expected one of them, as {source.spec}/SPLIT")
        return found["train"]
    return found


@functools.lru_cache(maxsize=8)
def _from_hub(name: str, split: str) -> Any:
    import datasets

    return datasets.load_dataset(name, split=split)
