"""Features of image sources: whole sets go through the scoring actors, and only what is not kept yet."""

from collections.abc import Sequence

from pipelines.evaluation.image_sets.sets import ImageSource, ranges, read_sources
from pipelines.evaluation.scoring.actor import Judges, scored
from pipelines.evaluation.scoring.feature_shards import KeptFeatures, is_whole, shards_there
from pipelines.runtime.stage import Stage


def features_of(sources: Sequence[ImageSource], judges: Judges, batch: int, stage: Stage) -> list[KeptFeatures]:
    """The features of each source, in `judges.kept`; blocks of images whose features are there are not read again."""
    asked = bool(judges.classifier)
    blocks = [ranges(len(source), batch) for source in sources]
    done = [_done(folder, wanted, asked) for folder, wanted in zip(judges.kept, blocks, strict=True)]
    seen = sum(stop - start for one in done for start, stop in one)
    with stage.progress(sum(len(source) for source in sources), done=seen) as bar:
        if any(len(wanted) > len(one) for wanted, one in zip(blocks, done, strict=True)):
            for block in scored(read_sources(sources, batch, done), judges):
                seen += len(block["source"])
                bar.update(seen)
    found = []
    for folder, wanted in zip(judges.kept, blocks, strict=True):
        there = set(shards_there(folder))
        found.append(KeptFeatures(folder, tuple(one for one in wanted if one in there)))
    return found


def _done(folder: str, wanted: Sequence[tuple[int, int]], predicted: bool) -> set[tuple[int, int]]:
    return {one for one in set(shards_there(folder)).intersection(wanted) if is_whole(folder, one, predicted)}
