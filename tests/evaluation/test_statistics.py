"""Intervals and p-values are correct: against analytic answers, and by simulation where there are none."""

import math

import numpy as np
import pytest

from samlight_hf.evaluation import bootstrap
from samlight_hf.evaluation.bootstrap import bootstrap_interval, paired_bootstrap
from samlight_hf.evaluation.statistics import (
    ModelResult,
    calibration_error,
    calibration_gap,
    protocol_differences,
    protocol_scores,
    size_class,
)


def clustered(generator, num_images, spread_between=1.0, spread_within=0.3):
    """Return values that are correlated within images of 1 to 8 instances, and their images."""
    sizes = generator.integers(1, 9, num_images)
    groups = np.repeat(np.arange(num_images), sizes)
    values = spread_between * generator.normal(size=num_images)[groups]
    return values + spread_within * generator.normal(size=len(groups)), [f"image {group}" for group in groups]


def record(image="p", instance=0, area=500, **measures):
    """Return an instance record. `iou=0.5` stands for {"box/single": 0.5}; a dict is not changed."""
    values = {name: value if isinstance(value, dict) else {"box/single": value} for name, value in measures.items()}
    return {"picture": image, "instance": instance, "area": area, "width": 9, "height": 9, **values}


def test_normal_sample_has_the_analytic_interval():
    values = np.random.default_rng(3).normal(0.7, 0.2, 400)
    mean, low, high = bootstrap_interval(values)
    half_width = 1.96 * values.std(ddof=1) / math.sqrt(len(values))
    assert mean == values.mean()
    assert low == pytest.approx(mean - half_width, abs=0.05 * half_width)
    assert high == pytest.approx(mean + half_width, abs=0.05 * half_width)


def test_smaller_confidence_is_narrower():
    values = np.random.default_rng(3).normal(size=200)
    wide, narrow = bootstrap_interval(values), bootstrap_interval(values, confidence=0.6827)
    assert wide.low < narrow.low < narrow.mean < narrow.high < wide.high
    assert (narrow.high - narrow.low) / (wide.high - wide.low) == pytest.approx(1 / 1.96, rel=0.05)


def test_clustered_interval_covers_and_the_naive_one_does_not():
    covered = {"by image": 0, "by instance": 0}
    for trial in range(300):
        values, groups = clustered(np.random.default_rng(trial), num_images=60)
        for name, given in (("by image", groups), ("by instance", None)):
            _, low, high = bootstrap_interval(values, given, num_resamples=400, seed=trial)
            covered[name] += low <= 0 <= high
    assert 0.91 <= covered["by image"] / 300 <= 0.98
    assert covered["by instance"] / 300 < 0.8


def test_clusters_of_one_are_no_clusters_and_names_and_order_of_groups_do_not_matter():
    values, groups = clustered(np.random.default_rng(0), 30)
    assert bootstrap_interval(values) == bootstrap_interval(values, list(range(len(values))))
    renamed = [(group, "x") for group in groups]
    assert bootstrap_interval(values, groups) == bootstrap_interval(values, renamed)


def test_interval_of_two_clusters_by_enumeration():
    # Draws of two images: AA, AB, BA, BB with instance means 0, 2/3 (2 of 3 instances are 1), 2/3, 1.
    mean, low, high = bootstrap_interval([0, 1, 1], ["A", "B", "B"], confidence=0.9)
    assert (mean, low, high) == (pytest.approx(2 / 3), 0, 1)
    middle = bootstrap_interval([0, 1, 1], ["A", "B", "B"], confidence=0.4)
    assert middle.low == middle.high == pytest.approx(2 / 3)


def test_one_cluster_has_a_mean_and_no_interval():
    mean, low, high = bootstrap_interval([0.2, 0.4], ["p", "p"])
    assert mean == pytest.approx(0.3) and math.isnan(low) and math.isnan(high)
    difference, *rest = paired_bootstrap([0.2, 0.4], [0.3, 0.5], ["p", "p"])
    assert difference == pytest.approx(0.1) and all(map(math.isnan, rest))


def test_seed_decides_and_memory_does_not(monkeypatch):
    values, groups = clustered(np.random.default_rng(5), 40)
    first = bootstrap_interval(values, groups)
    assert bootstrap_interval(values, groups) == first
    assert bootstrap_interval(values, groups, seed=1) != first
    monkeypatch.setattr(bootstrap, "_MAX_DRAWS", 7)  # less than one draw of all images
    assert bootstrap_interval(values, groups) == pytest.approx(first, abs=1e-12)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([0.5, math.nan, 0.1],), r"1 of 3 values are not finite, first: values\[1\] is nan"),
        (([0.5, math.inf],), "not finite"),
        (([],), "empty"),
        (([[0.5]],), "one dimension"),
        (([0.5, 0.6], ["a"]), "1 groups for 2 values"),
        (([0.5, 0.6], None, 1.0), "confidence=1.0"),
        (([0.5, 0.6], None, 0.95, 0), "num_resamples=0"),
    ],
)
def test_bad_input_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        bootstrap_interval(*arguments)


def test_identical_models_differ_by_nothing():
    values, groups = clustered(np.random.default_rng(1), 30)
    assert paired_bootstrap(values, values, groups) == (0, 0, 0, 1)


def test_obvious_difference_has_a_small_p_value_and_the_right_sign():
    values, groups = clustered(np.random.default_rng(1), 50)
    better = values + 0.1 + 0.05 * np.random.default_rng(2).normal(size=len(values))
    test = paired_bootstrap(values, better, groups)
    assert test.difference == pytest.approx(0.1, abs=0.02)
    assert 0 < test.low < test.difference < test.high
    assert test.p_value == 2 / 10_001
    back = paired_bootstrap(better, values, groups)
    assert back == pytest.approx((-test.difference, -test.high, -test.low, test.p_value))
    # The reason for pairing: the two separate intervals overlap.
    assert bootstrap_interval(better, groups).low < bootstrap_interval(values, groups).high


def test_models_that_are_equally_good_are_called_different_at_the_stated_rate():
    rejected = 0
    for trial in range(300):
        noise, groups = clustered(np.random.default_rng(trial), 60)
        test = paired_bootstrap(np.zeros(len(noise)), noise, groups, num_resamples=400, seed=trial)
        rejected += test.p_value < 0.05
        if abs(test.p_value - 0.05) > 0.01:
            assert (test.p_value < 0.05) == (not test.low <= 0 <= test.high)
    assert 0.02 <= rejected / 300 <= 0.09


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([0.5], [0.5, 0.6]), "same instances, but has 1 and 2 values"),
        (([0.5, 0.6], [0.5, 0.6], None, ["a", "b"], ["a", "c"]), "place 1 holds 'b' and 'c'"),
        (([0.5, 0.6], [0.5, 0.6], None, ["a"], ["a"]), "1 and 1 instances"),
        (([0.5, 0.6], [0.5, 0.6], None, ["a", "b"]), "or neither"),
        (([0.5, 0.6], [0.5, math.nan]), r"values_b\[1\] is nan"),
    ],
)
def test_pairs_that_are_none_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        paired_bootstrap(*arguments)


def test_size_classes_are_cocos():
    areas = {1: "small", 1023.5: "small", 1024: "medium", 9215: "medium", 9216: "large", 10**9: "large"}
    assert {area: size_class(area) for area in areas} == areas
    for area in (0, -3, math.nan, math.inf):
        with pytest.raises(ValueError, match="not a positive number"):
            size_class(area)


def test_calibration_gap():
    assert calibration_gap([0.5, 1.1], [0.7, 1.0]) == pytest.approx(0.15)  # signs do not cancel


def test_calibration_error():
    # In the bin from 0.7 sums of 1.5 and 1.3; in the last one, which contains 1 and values above it, of 3.0 and 2.5.
    predicted, iou = [0.72, 0.9, 0.78, 1.0, 1.1], [0.9, 0.8, 0.4, 0.9, 0.8]
    assert calibration_error(predicted, iou) == pytest.approx((0.2 + 0.5) / 5)
    assert calibration_error([0.65, 0.75], [0.75, 0.65]) == pytest.approx(0.1)  # bins do not cancel
    assert calibration_error([0.75, 0.75], [0.95, 0.55]) == pytest.approx(0)  # right on average, each off by 0.2


@pytest.mark.parametrize("measure", [calibration_gap, calibration_error])
def test_calibration_of_what_cannot_be_compared(measure):
    for predicted, iou in (([0.5], [0.5, 0.6]), ([], []), ([math.nan], [0.5])):
        with pytest.raises(ValueError):
            measure(predicted, iou)


def test_interval_of_the_calibration_error_by_enumeration():
    # Draws of two images: AA, AB, BA, BB with 0.2, (|0.2 - 0.2| + 0.1) / 3 twice, and (0.4 + 0.2) / 4.
    records = [
        record("A", 0, predicted_iou=0.55, iou=0.75),
        record("B", 1, predicted_iou=0.55, iou=0.35),
        record("B", 2, predicted_iou=0.85, iou=0.75),
    ]
    for confidence, high in ((0.9, 0.2), (0.4, 0.15)):
        score = protocol_scores(records, ["box/single"], confidence=confidence)["box/single"]["calibration_error"]
        assert score == pytest.approx({"mean": 0.1 / 3, "low": 0.1 / 3, "high": high, "n": 3})


def test_protocol_scores_are_those_of_the_single_functions():
    generator = np.random.default_rng(0)
    records = [
        record(f"p{number // 3}", number, int(generator.integers(100, 20_000)), iou=generator.random(),
               boundary_iou=generator.random(), predicted_iou=generator.random())
        for number in range(60)
    ]  # fmt: skip
    scores = protocol_scores(records, ["box/single"])["box/single"]
    values = {name: [r[name]["box/single"] for r in records] for name in ("iou", "boundary_iou", "predicted_iou")}
    images = [r["picture"] for r in records]
    for name in ("iou", "boundary_iou"):
        expected = bootstrap_interval(values[name], images)
        assert scores[name] == pytest.approx({"n": 60, **expected._asdict()})
    for name, measure in (("calibration_gap", calibration_gap), ("calibration_error", calibration_error)):
        assert scores[name]["mean"] == pytest.approx(measure(values["predicted_iou"], values["iou"]))
    assert 0 < scores["calibration_error"]["mean"] < scores["calibration_gap"]["mean"]
    medium = [r for r in records if 1024 <= r["area"] < 9216]
    expected = bootstrap_interval([r["iou"]["box/single"] for r in medium], [r["picture"] for r in medium])
    assert scores["by_size"]["medium"] == {"n": len(medium), **expected._asdict()}
    assert sum(score["n"] for score in scores["by_size"].values()) == 60


@pytest.mark.parametrize("gone", [math.nan, None, {}])
def test_missing_value_takes_the_mean_with_it_and_is_named(gone):
    records = [
        record("a", 1, iou=0.5, boundary_iou=0.4, predicted_iou=0.6),
        record("b", 7, iou=gone, boundary_iou=0.4, predicted_iou=0.6),
        record("c", 8, 5000, iou=0.5, boundary_iou=0.4, predicted_iou=0.6),
    ]
    scores = protocol_scores(records, ["box/single"])["box/single"]
    for score in (scores["iou"], scores["calibration_gap"], scores["calibration_error"]):
        assert score["mean"] is score["low"] is score["high"] is None
        assert score["reason"] == "1 of 3 values are missing or not finite, first: image b, instance 7"
    assert scores["boundary_iou"]["mean"] == pytest.approx(0.4)
    assert scores["by_size"]["small"]["mean"] is None
    assert scores["by_size"]["medium"] == {
        "mean": 0.5, "low": None, "high": None, "n": 1, "reason": "no interval: a single image",
    }  # fmt: skip
    assert scores["by_size"]["large"] == {
        "mean": None, "low": None, "high": None, "n": 0, "reason": "no such instances",
    }  # fmt: skip


def test_protocol_differences_pair_instances_in_any_order():
    generator = np.random.default_rng(0)
    a = [record(f"p{number // 2}", number % 2, iou=generator.random()) for number in range(40)]
    b = [record(r["picture"], r["instance"], iou=r["iou"]["box/single"] * 0.9) for r in a]
    expected = paired_bootstrap(
        [r["iou"]["box/single"] for r in a], [r["iou"]["box/single"] for r in b], [r["picture"] for r in a]
    )
    for shuffled in (b, b[::-1]):
        assert protocol_differences(a, shuffled, ["box/single"])["box/single"] == {"n": 40, **expected._asdict()}


def test_protocol_differences_say_why_there_is_none():
    a = [record("a", number, iou={"x": 0.5, "y": math.nan}) for number in range(3)]
    other = protocol_differences(a, a[1:], ["x"], ("first", "second"))["x"]
    assert other["difference"] is None
    assert other["reason"] == "not the same instances: 1 only in first, 0 only in second"
    same = protocol_differences(a, a, ["x", "y"], ("first", "second"))
    assert same["x"]["difference"] == 0 and same["x"]["p_value"] is None and "single image" in same["x"]["reason"]
    assert same["y"]["difference"] is None and "(first)" in same["y"]["reason"] and "(second)" in same["y"]["reason"]
    assert protocol_differences([], [], ["x"])["x"]["reason"] == "no instances"


def test_model_result_checks_its_records():
    good = record(iou=0.5)
    with pytest.raises(ValueError, match="must name the model"):
        ModelResult({}, [good])
    with pytest.raises(ValueError, match="m: image p, instance 0 has two records"):
        ModelResult({"model": "m"}, [good, good])
    with pytest.raises(ValueError, match="m: record 0 has no area, iou"):
        ModelResult({"model": "m"}, [{"picture": "p", "instance": 0}])
    for measures in ({"iou": 1.2}, {"iou": 0.5, "boundary_iou": -0.1}):
        with pytest.raises(ValueError, match=r"m: image p, instance 0: box/single \w*iou is"):
            ModelResult({"model": "m"}, [record(**measures)])
    assert ModelResult({"model": "m"}, [good]).score("1 click/single")["reason"] == "not evaluated"
