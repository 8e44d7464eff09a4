"""The comparison must pass what is close, fail what is not, and say where."""

from __future__ import annotations

import pytest
import torch

from fastmix.testing import assert_close, rms_ratio


def test_rms_ratio() -> None:
    expected = torch.tensor([3.0, 4.0])
    assert rms_ratio(expected, expected) == 0.0
    assert rms_ratio(expected * 1.01, expected) == pytest.approx(0.01, rel=1e-5)
    assert rms_ratio(torch.zeros(2), torch.zeros(2)) == 0.0
    assert rms_ratio(torch.ones(2), torch.zeros(2)) == float("inf")
    assert rms_ratio(torch.tensor([float("nan"), 4.0]), expected) != rms_ratio(expected, expected)
    assert rms_ratio(torch.empty(0), torch.empty(0)) == 0.0
    assert rms_ratio(expected * 1e-300, (expected * 1e-300).double()) == 0.0


def test_close_passes() -> None:
    expected = torch.randn(4, 5)
    assert_close(expected + 1e-8, expected, 1e-6)
    assert_close(torch.tensor([float("inf"), float("nan"), 1.0]), torch.tensor([float("inf"), float("nan"), 1.0]), 1e-6)
    assert_close(torch.full((3,), 1e-13), torch.zeros(3), 1e-9)
    assert_close(torch.empty(0, 3), torch.empty(0, 3), 1e-9)


@pytest.mark.parametrize(
    ("actual", "expected", "message"),
    [
        (torch.zeros(3), torch.zeros(4), r"loss: shape \(3,\), expected \(4,\)"),
        (torch.zeros(3, 1), torch.zeros(3), "shape"),
        (torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, 2.5, 3.0]), r"RMS ratio .*\n.*1 of 3 .*first at \[1\]"),
        (torch.tensor([1, 2]), torch.tensor([1, 3]), r"must be equal\n.*\[1\]"),
        (torch.tensor([True]), torch.tensor([False]), "must be equal"),
        (torch.tensor([float("nan"), 1.0]), torch.tensor([1.0, 1.0]), "finite exactly"),
        (torch.tensor([1.0, 1.0]), torch.tensor([float("inf"), 1.0]), "finite exactly"),
        (torch.tensor([-float("inf")]), torch.tensor([float("inf")]), "finite exactly"),
        (torch.tensor([1e-3]), torch.tensor([0.0]), "expected zero"),
        (torch.tensor([1e-3]), torch.tensor([1e-14]), "expected zero"),
    ],
)
def test_apart_fails(actual: torch.Tensor, expected: torch.Tensor, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        assert_close(actual, expected, 1e-6, name="loss")


def test_worst_entries_come_first_and_are_few() -> None:
    expected = torch.ones(100)
    actual = expected.clone()
    actual[50:70] += torch.arange(20.0)
    with pytest.raises(AssertionError) as failure:
        assert_close(actual, expected, 1e-6)
    lines = str(failure.value).splitlines()
    assert lines[2].startswith("  [69]: 20")
    assert len(lines) == 2 + 8


def test_masked_entries_do_not_count() -> None:
    expected = torch.randn(2, 3, 4)
    mask = torch.tensor([[1.0, 1.0, 0.0], [1.0, 0.0, 0.0]])[..., None]
    actual = expected.masked_fill(mask == 0, float("nan"))
    assert_close(actual, expected, 1e-9, mask=mask)
    with pytest.raises(AssertionError):
        assert_close(actual, expected, 1e-9)
    assert_close(actual[..., 0], expected[..., 0], 1e-9, mask=mask)
    assert_close(actual, expected, 1e-9, mask=torch.zeros_like(mask))
