"""The ILSVRC training images as they are downloaded: one tar that holds a tar for each synset."""

from concurrent.futures import ThreadPoolExecutor

from pipelines.images.sources.table import Listed, listed
from pipelines.images.sources.tars import Member, members, opened
from pipelines.runtime.errors import UserError

READS_AT_ONCE = 32  # inner tars indexed at a time: on S3 each header is a request


def list_ilsvrc(file: str, path: str) -> Listed:
    """Images of the tar at `path`, called `file` in the listing. The keys are those of the unpacked tree, `synset/name`, the
    classes the sorted synsets.

    Nothing is unpacked: an image is a byte range of the outer tar. Raises UserError when the tar holds no inner tars, or links to them.
    """
    with opened(path) as outer:
        inner = [one for one in members(path, outer) if one.name.endswith(".tar")]
    if not inner:
        raise UserError(f"images.source {path!r} holds no inner tars; expected one a synset, as in ILSVRC2012_img_train.tar")
    if linked := next((one for one in inner if one.link), None):
        raise UserError(f"{path}: {linked.name} {linked.reason}")

    def of(synset: Member) -> list[Member]:
        with opened(path) as tar:
            return list(members(path, tar, synset.offset, synset.offset + synset.size))

    with ThreadPoolExecutor(READS_AT_ONCE) as pool:
        images = list(pool.map(of, inner))
    synsets = [one.name.rpartition("/")[2].removesuffix(".tar") for one in inner]
    class_names = sorted(set(synsets))
    numbers = {name: number for number, name in enumerate(class_names)}
    found = [(f"{synset}/{one.name}", numbers[synset], one) for synset, each in zip(synsets, images, strict=True) for one in each]
    table = listed(
        keys=[key for key, _, _ in found],
        labels=[label for _, label, _ in found],
        files=[file] * len(found),
        offsets=[one.offset for *_, one in found],
        sizes=[one.size for *_, one in found],
        reasons=[one.reason for *_, one in found],
    )
    with_images = {key.partition("/")[0] for key, _, _ in found}
    return Listed(table, class_names, {name: "its tar is empty" for name in class_names if name not in with_images})
