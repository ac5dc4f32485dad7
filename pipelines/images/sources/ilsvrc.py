"""The ILSVRC training images as downloaded: a tar that contains one tar per synset."""

from concurrent.futures import ThreadPoolExecutor

from pipelines.images.sources.table import Listed, listed
from pipelines.images.sources.tars import Member, members, opened
from pipelines.runtime.errors import UserError

READS_AT_ONCE = 32  # inner tars indexed in parallel: on S3 each header is a request


def list_ilsvrc(file: str, path: str) -> Listed:
    """Images of the tar at `path`, which the listing calls `file`. Keys are `synset/name`, as in the unpacked tree; classes are the sorted
    synsets.

    Nothing is unpacked: an image is a byte range of the outer tar. Raises UserError if the tar contains no inner tars, or links to them.
    """
    with opened(path) as outer:
        inner = [member for member in members(path, outer) if member.name.endswith(".tar")]
    if not inner:
        raise UserError(f"images.source {path!r} contains no inner tars; expected one per synset, as in ILSVRC2012_img_train.tar")
    if linked := next((member for member in inner if member.link), None):
        raise UserError(f"{path}: {linked.name} {linked.reason}")

    def read(synset: Member) -> list[Member]:
        with opened(path) as tar:
            return list(members(path, tar, synset.offset, synset.offset + synset.size))

    with ThreadPoolExecutor(READS_AT_ONCE) as pool:
        images = list(pool.map(read, inner))
    synsets = [member.name.rpartition("/")[2].removesuffix(".tar") for member in inner]
    class_names = sorted(set(synsets))
    numbers = {name: number for number, name in enumerate(class_names)}
    found = [(f"{synset}/{image.name}", numbers[synset], image) for synset, each in zip(synsets, images, strict=True) for image in each]
    table = listed(
        keys=[key for key, _, _ in found],
        labels=[label for _, label, _ in found],
        files=[file] * len(found),
        offsets=[image.offset for *_, image in found],
        sizes=[image.size for *_, image in found],
        reasons=[image.reason for *_, image in found],
    )
    with_images = {key.partition("/")[0] for key, _, _ in found}
    return Listed(table, class_names, {name: "its tar is empty" for name in class_names if name not in with_images})
