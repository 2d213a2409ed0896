"""How often each of the three masks is the best and the predicted best, against counts by hand."""

import pytest

from samlight_hf.evaluation.levels import mask_levels


def record(number, area, best, predicted, iou=0.5, areas=(0.5, 1.0, 2.0)) -> dict:
    relative = {} if areas is None else dict(zip(("1 click/first", "1 click/second", "1 click/third"), areas))
    return {
        "picture": f"image {number // 2}", "instance": number, "area": area,
        "iou": {"1 click/single": 0.1, "1 click/predicted": 0.2, "1 click/oracle": iou},
        "mask_index": {"1 click/predicted": predicted, "1 click/oracle": best}, "relative_area": relative,
    }  # fmt: skip


RECORDS = [
    record(0, 100, best=0, predicted=1, areas=(1, 2, 3)),
    record(1, 100, best=2, predicted=2, areas=(1, 4, 3)),
    record(2, 5000, best=1, predicted=1, areas=(4, 9, 3)),
    record(3, 5000, best=0, predicted=0, iou=0.0, areas=(0, 0, 3)),  # no mask touches it
]


def means(scores: dict) -> list:
    assert list(scores) == ["first", "second", "third"]
    return [score["mean"] for score in scores.values()]


def test_shares_and_areas_are_counts_by_hand():
    levels = mask_levels(RECORDS)
    assert list(levels) == ["1 click"] and list(levels["1 click"]) == ["all", "small", "medium", "large"]
    everything = levels["1 click"]["all"]
    assert means(everything["best"]) == [0.25, 0.25, 0.25]
    assert everything["no_overlap"]["mean"] == 0.25
    assert means(everything["predicted_best"]) == [0.25, 0.5, 0.25]
    assert means(everything["mean_area"]) == [1.5, 3.75, 3.0]
    assert everything["median_area"] == {"first": 1.0, "second": 3.0, "third": 3.0}
    assert everything["best"]["first"]["n"] == 4
    assert everything["best"]["first"]["low"] == 0.0 and everything["best"]["first"]["high"] == 0.5


def test_each_size_has_its_own():
    small, medium, large = (mask_levels(RECORDS)["1 click"][size] for size in ("small", "medium", "large"))
    assert means(small["best"]) == [0.5, 0.0, 0.5] and small["no_overlap"]["mean"] == 0.0
    assert means(medium["best"]) == [0.0, 0.5, 0.0] and medium["no_overlap"]["mean"] == 0.5
    assert means(medium["mean_area"]) == [2.0, 4.5, 3.0]
    assert means(large["best"]) == [None] * 3 and large["best"]["first"]["reason"] == "no such instances"
    assert large["median_area"] == {"first": None, "second": None, "third": None}


@pytest.mark.parametrize("absent", ["predicted", "oracle", "areas"])
def test_a_value_that_is_absent_is_missing_and_counted(absent):
    records = [record(number, 100, 0, 1) for number in range(3)]
    if absent == "areas":
        records[1]["relative_area"] = {}
    else:
        del records[1]["mask_index"][f"1 click/{absent}"]
    found = mask_levels(records)["1 click"]["all"]
    names = {"predicted": "predicted_best", "oracle": "best", "areas": "mean_area"}
    for name in names.values():
        missing = found[name]["first"]["mean"] is None
        assert missing == (name == names[absent]), name
    assert "1 of 3 values are missing" in found[names[absent]]["first"]["reason"]
    assert (found["median_area"]["first"] is None) == (absent == "areas")


def test_records_without_three_masks_have_none():
    records = [{"picture": "a", "instance": 1, "area": 9, "iou": {"box/single": 0.5}, "mask_index": {}}]
    assert mask_levels(records) == mask_levels([]) == {}
