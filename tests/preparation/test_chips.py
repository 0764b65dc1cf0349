"""The part of a large image that becomes an object's chip."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from preparation.chips import MIN_EDGE, chip_box, square_box


@given(st.tuples(*[st.floats(-30, 90)] * 4), st.tuples(*[st.integers(1, 60)] * 2), st.floats(0, 1))
@settings(max_examples=200, deadline=None)
def test_boxes_stay_inside_and_hold_their_object(values, size, margin):
    box = (*np.minimum(values[:2], values[2:]).tolist(), *np.maximum(values[:2], values[2:]).tolist())
    for cut in (chip_box, square_box):
        result = cut(box, size, margin)
        outside = any(box[axis] >= size[axis] or (box[axis + 2] <= 0 and box[axis] < 0) for axis in (0, 1))
        assert (result is None) == outside
        if result is None:
            continue
        for axis in (0, 1):
            near, far = result[axis], result[axis + 2]
            assert 0 <= near < far <= size[axis] and far - near >= min(MIN_EDGE, size[axis])
            if cut is chip_box:
                assert near <= max(box[axis], 0) and far >= min(box[axis + 2], size[axis])


def test_square_boxes():
    assert square_box((40, 40, 60, 50), (100, 100), 0.1) == (39, 34, 61, 56)  # side 22, around (50, 45)
    assert square_box((0, 40, 20, 50), (100, 100), 0.1) == (0, 34, 22, 56)  # shifted into the image
    assert square_box((90, 90, 110, 100), (100, 100), 0.1) == (78, 78, 100, 100)
    assert square_box((0, 0, 200, 10), (100, 50), 0.1) == (0, 0, 100, 50)  # larger than the image: clipped
