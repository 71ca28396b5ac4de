"""How far outputs may be from the model's."""

import numpy as np
import pytest
import torch

from convmixer_timm.inference.agreement import check_agreement, difference, images_to_compare


def test_what_is_compared_is_spread_over_all_images():
    batches = list(torch.arange(320).split(10))
    assert images_to_compare(batches).tolist() == list(range(0, 320, 10))
    assert images_to_compare(batches[:1]).tolist() == list(range(10))
    assert len(images_to_compare(batches, 10)) == 30
    assert len(images_to_compare([torch.arange(48)] * 3, 48)) == 48
    assert len(images_to_compare(batches[:1], 10)) == 10


def test_one_image_that_int8_gets_wrong_is_no_reason_to_refuse():
    expected = torch.randn(32, 10, generator=torch.Generator().manual_seed(0))
    found = expected.clone()
    found[3, 0] += expected.abs().max()
    check_agreement(found, expected, "int8")
    assert difference(found, expected, "fp32") == pytest.approx(1)
    for precision in ("fp32", "bf16"):
        with pytest.raises(RuntimeError, match="the outputs differ by 1 of the largest, more than 0"):
            check_agreement(found, expected, precision)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
def test_other_outputs_are_refused(precision):
    expected = torch.randn(32, 10, generator=torch.Generator().manual_seed(0))
    for found in (expected.flip(0), torch.zeros_like(expected), expected * np.nan, expected + np.inf):
        with pytest.raises(RuntimeError, match="the outputs differ by"):
            check_agreement(found, expected, precision)
    nothing = torch.zeros(4, 10)
    check_agreement(nothing, nothing, precision)
    with pytest.raises(RuntimeError, match="the outputs differ by"):
        check_agreement(nothing + 1, nothing, precision)
