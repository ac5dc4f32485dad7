"""Image sources behind one interface: a source is listed as a table of keys, labels and places (`table.py`), and the encoded bytes of
an image are read from its place (`places.py`). Every form can be local or on `s3://`.

    imagefolder  class/…/image.jpg                         ILSVRC unpacked, torchvision's ImageFolder
    ilsvrc       ILSVRC2012_img_train.tar                  a tar of tars, as downloaded
    webdataset   shard-{000..146}.tar, or a folder of tars
    parquet      train-{00..40}.parquet, or a folder of them: Hugging Face's layout
"""

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import pyarrow as pa

from pipelines.images.sources.class_folders import class_folders
from pipelines.images.sources.ilsvrc import list_ilsvrc
from pipelines.images.sources.imagefolder import SUFFIXES, Files, list_files, list_imagefolder
from pipelines.images.sources.parquet import list_parquet
from pipelines.images.sources.patterns import FILES, expanded, root_of
from pipelines.images.sources.table import Listed
from pipelines.images.sources.tars import members, opened
from pipelines.images.sources.webdataset import list_webdataset
from pipelines.runtime import storage
from pipelines.runtime.errors import UserError

READS_AT_ONCE = 16
FITTING = {"ilsvrc": "one .tar file that contains tars", "webdataset": ".tar files", "parquet": ".parquet files"}


@dataclass(frozen=True)
class Source:
    """An existing source: its form, its root folder, and its files relative to the root."""

    source: str
    form: str
    root: str
    files: Files

    @property
    def stamp(self) -> str:
        """Digest of the names, sizes and versions of tars or Parquet files; empty for a folder tree, whose listing already covers its
        files."""
        return "" if self.form == "imagefolder" else storage.digest(json.dumps([self.form, sorted(self.files)]).encode())

    def images(self, parts: bool = False) -> Listed:
        """All images, in any order. `parts`: class folders are `part/class`. Raises UserError if a file does not have the source's form."""
        names = sorted(name for name, *_ in self.files)
        if self.form == "ilsvrc":
            return self._with_versions(list_ilsvrc(names[0], storage.join(self.root, names[0])))
        if self.form == "webdataset":
            return self._with_versions(list_webdataset(self.root, names))
        if self.form == "parquet":
            return self._with_versions(list_parquet(self.root, names))
        return list_imagefolder(self.files, parts, *class_folders(self.root, parts))

    def _with_versions(self, found: Listed) -> Listed:
        """Set the version of each image to the version of its file."""
        versions = {name: version for name, _, version in self.files}
        files = found.table.column("file").combine_chunks()
        known = pa.array([versions[name] for name in files.dictionary.to_pylist()], pa.int64())
        place = found.table.schema.get_field_index("version")
        return replace(found, table=found.table.set_column(place, "version", known.take(files.indices)))


def find_source(source: str, form: str = "auto") -> Source:
    """Find the source, in the given form or the form of its files. Raises UserError if it is missing or has no known form."""
    if missing := _missing(source):
        raise UserError(
            f"images.source {source!r} does not exist{f' ({missing[0]} is missing)' if missing[0] != source else ''}; expected a folder "
            "with one subfolder of images per class, a tar, Parquet files, or a pattern such as shard-{000..146}.tar, local or on s3://"
        )
    if source.endswith(FILES) and storage.is_directory(source):
        raise UserError(
            f"images.source {source!r} is a folder with the name of a file",
            remedy=f"name its files with a pattern, such as {source}/part-{{00000..00007}}.parquet, or rename it",
        )
    root = root_of(source)
    files = list_files(source) if "{" not in source and storage.is_directory(source) else _sized(source, root)
    form = _form(root, files) if form == "auto" else form
    if form in FITTING:
        fitting = [file for file in files if file[0].endswith(".parquet" if form == "parquet" else ".tar")]
        if not fitting or (form == "ilsvrc" and len(fitting) != 1):
            raise UserError(f"images.source {source!r} should have the form {form}: expected {FITTING[form]}, found {len(fitting)}")
        files = fitting
    return Source(source, form, root, files)


def exists(source: str) -> bool:
    """Whether the source exists; for a pattern, whether all its files exist."""
    return not _missing(source)


def _missing(source: str) -> list[str]:
    if not source:
        return [source]
    paths = expanded(source)
    with ThreadPoolExecutor(READS_AT_ONCE) as pool:
        return [path for path, is_present in zip(paths, pool.map(storage.exists, paths), strict=True) if not is_present]


def _sized(source: str, root: str) -> Files:
    paths = expanded(source)
    with ThreadPoolExecutor(READS_AT_ONCE) as pool:
        found = pool.map(storage.size_and_version, paths)
        return [(path[len(root) :].lstrip("/"), *versioned) for path, versioned in zip(paths, found, strict=True)]


def _form(root: str, files: Files) -> str:
    """Detect the form: images make a folder tree, else Parquet files, else tars (ilsvrc: a single tar that contains tars). Raises UserError
    for Parquet files next to tars."""
    names = [name for name, *_ in files]
    if any(name.lower().endswith(SUFFIXES) for name in names):
        return "imagefolder"
    tars = [name for name in names if name.endswith(".tar")]
    if any(name.endswith(".parquet") for name in names):
        if tars:
            raise UserError(
                f"images.source {root!r} contains both Parquet files and tars", remedy="set images.format to parquet or webdataset"
            )
        return "parquet"
    if not tars:
        return "imagefolder"  # an empty tree; the listing reports it
    return "ilsvrc" if len(tars) == 1 and _holds_tars(storage.join(root, tars[0])) else "webdataset"


def _holds_tars(path: str) -> bool:
    with opened(path) as file:
        first = next(members(path, file), None)
    return first is not None and first.name.endswith(".tar")
