"""Numbers of few images are marked as such, from the first count that is too small."""

import pytest

from pipelines.evaluation.cautions import of_distance, of_distance_in_short, of_evaluation, of_label_agreement, of_run


@pytest.mark.parametrize(("features", "dimension"), [("inception", 2048), ("efficientnet-lite0", 1280)])
def test_a_distance_of_fewer_images_than_features_is_marked(features: str, dimension: int) -> None:
    assert of_distance({"samples": dimension, "reference images": None}, features) == ""
    assert of_distance({"samples": 50_000, "reference images": dimension - 1}, features) == (
        f"caution: {dimension - 1:,} reference images are fewer than the {dimension:,} features: the covariance is singular and the "
        "Fréchet distance too large; compare it only with distances of equal numbers of images"
    )
    assert of_distance({"samples": 300, "reference images": 50_000}, features).startswith("caution: 300 samples are fewer than")
    assert of_distance({"samples": 1000, "reference images": 299}, features) == (
        "warning: 1,000 samples and 299 reference images are far too few: below 300 images most of a Fréchet distance is the error of its "
        "estimate; draw no conclusion from it"
    )
    short = [of_distance_in_short({"samples": count}, features) for count in (dimension, 300, 299)]
    assert short == ["", f"caution: fewer images than the {dimension:,} features", "warning: far too few images"]


def test_a_label_agreement_of_few_samples_says_how_far_it_may_be_off() -> None:
    assert of_label_agreement(300) == ""
    assert of_label_agreement(100) == "caution: the label agreement of 100 samples has a standard error of up to 5 percentage points"
    assert "of up to 25 percentage points" in of_label_agreement(4)


def test_an_evaluation_and_a_run_by_their_summaries() -> None:
    enough = {"features": "inception", "images": 50_000, "reference_images": None, "label_agreement": 0.9}
    few = {**enough, "images": 30, "reference_images": 24}
    assert of_evaluation(enough) == []
    assert [text.partition(":")[0] for text in of_evaluation(few)] == ["warning", "caution"]
    assert len(of_evaluation({**few, "label_agreement": None})) == 1
    assert of_evaluation({"images": 30}) == []  # of an earlier version: of which network is not said
    assert of_run({}, [enough]) == []
    assert of_run({"frechet_images": 500}, [few, few]) == [
        *of_evaluation(few),
        of_distance({"images in each row of the comparison": 500}, "inception"),
    ]
