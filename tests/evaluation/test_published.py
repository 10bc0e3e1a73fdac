import math

import pytest

from altopt.datasets.voc import VOC_CLASSES
from altopt.errors import UsageError
from altopt.evaluation.published import PAPER_SHARED, PAPER_UNSHARED, PY_FASTER_RCNN, VOC07_VGG16, Published, beside


@pytest.mark.parametrize("result", VOC07_VGG16, ids=lambda result: result.name)
def test_mean_of_the_classes_is_the_stated_one(result: Published) -> None:
    assert len(result.average_precisions) == len(VOC_CLASSES) == len(set(VOC_CLASSES)) == 20
    # Both sides are rounded to 0.1: two digits of a class exchanged, or a class left out, would show.
    assert sum(result.average_precisions) / 20 == pytest.approx(result.mean, abs=0.051)


def test_stated_means() -> None:
    assert (PAPER_SHARED.mean, PAPER_UNSHARED.mean, PY_FASTER_RCNN.mean) == (69.9, 68.5, 68.9)
    assert all(result.source for result in VOC07_VGG16)


def test_rows_stand_beside_the_published_ones() -> None:
    measured = {name: (50 + index) / 100 for index, name in reversed(list(enumerate(VOC_CLASSES)))}
    rows = beside(measured)
    assert [row.name for row in rows] == [*VOC_CLASSES, "mAP"]
    assert rows[0].measured == pytest.approx(50)
    assert rows[0].published == (70.0, 74.1, 68.5)
    assert rows[14].name == "person"
    assert rows[14].published == (76.3, 75.9, 76.7)
    assert rows[-1].measured == pytest.approx(59.5)
    assert rows[-1].published == (69.9, 68.5, 68.9)


def test_columns_can_be_chosen() -> None:
    assert beside({}, [PY_FASTER_RCNN])[-1].published == (68.9,)
    assert beside({}, [])[0].published == ()


def test_class_without_measurement_leaves_the_mean_open() -> None:
    measured = dict.fromkeys(VOC_CLASSES, 0.5)
    assert beside(measured)[-1].measured == pytest.approx(50)
    assert beside({**measured, "cow": math.nan})[9].measured is None
    assert beside({**measured, "cow": math.nan})[-1].measured is None
    assert beside({**measured, "cow": None})[-1].measured is None
    del measured["cow"]
    assert beside(measured)[-1].measured is None


def test_other_classes_are_refused() -> None:
    with pytest.raises(UsageError, match='class "zebra" is none of VOC2007'):
        beside({"zebra": 0.5})
