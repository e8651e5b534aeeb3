"""Shape classes: large enough for every call, few, and within the engine's limits."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.support.helpers import examples

from sam3rt.backends.tensorrt.memory import Layout, aligned
from sam3rt.backends.tensorrt.runs import Limits, ShapeClass, classify, usual_classes

limits = st.builds(Limits, st.integers(1, 70), st.integers(1, 130))


@given(limits, st.data())
@examples(200)
def test_a_class_holds_its_call_and_fits_the_engine(limit: Limits, data: st.DataObject) -> None:
    objects = data.draw(st.integers(1, limit.objects))
    points = data.draw(st.integers(0, limit.points))
    own = data.draw(st.booleans())
    found = classify(objects, points, own, limit)
    assert objects <= found.objects <= limit.objects
    assert points <= found.points <= limit.points
    assert found.masks == (found.objects if own else 1)
    # No more than four times what was asked for, beyond the least class.
    assert found.objects < 4 * objects
    assert found.points < max(4 * points, 5)


def test_there_are_few_classes() -> None:
    limit = Limits(16, 32)
    classes = {classify(o, p, False, limit) for o in range(1, 17) for p in range(33)}
    assert classes == set(usual_classes(limit))
    assert {c.objects for c in classes} == {1, 4, 16}
    assert {c.points for c in classes} == {4, 8, 32}
    assert classify(17, 33, False, Limits(70, 130)) == ShapeClass(64, 128, 1)
    assert usual_classes(Limits(1, 6)) == (ShapeClass(1, 4, 1), ShapeClass(1, 6, 1))
    assert classify(1, 0, False, Limits(16, 32)) == ShapeClass(1, 4, 1)
    assert classify(3, 5, True, Limits(16, 32)) == ShapeClass(4, 8, 4)
    assert classify(5, 5, False, Limits(6, 6)) == ShapeClass(6, 6, 1)


@given(st.lists(st.tuples(st.integers(1, 40), st.sampled_from(["f2", "f4", "i8", "u1"]))))
@examples(60)
def test_tensors_lie_apart_and_aligned(tensors: list[tuple[int, str]]) -> None:
    import numpy as np

    layout = Layout((str(i), (n,), np.dtype(t)) for i, (n, t) in enumerate(tensors))
    end = 0
    for slot in layout.slots.values():
        assert slot.offset >= end
        assert slot.offset % 256 == 0
        end = slot.offset + slot.nbytes
    assert layout.nbytes == end


@pytest.mark.parametrize(("nbytes", "expected"), [(0, 0), (1, 256), (256, 256), (257, 512)])
def test_aligned(nbytes: int, expected: int) -> None:
    assert aligned(nbytes) == expected
