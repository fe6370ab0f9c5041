"""Just Train Twice: the weights of the second training."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from counterpoise.samplers import balancing_up_weight, just_train_twice_weights

ERROR = torch.tensor([True, False, False, False, False, True, False])


def test_errors_get_the_weight_and_the_rest_one() -> None:
    assert just_train_twice_weights(ERROR, 20.0).tolist() == [20.0, 1, 1, 1, 1, 20.0, 1]


def test_weight_one_changes_nothing_and_weight_zero_leaves_errors_out() -> None:
    assert just_train_twice_weights(ERROR, 1).tolist() == [1.0] * 7
    assert just_train_twice_weights(ERROR, 0).tolist() == [0.0, 1, 1, 1, 1, 0.0, 1]


def test_no_errors_leave_all_weights_at_one() -> None:
    none = torch.zeros(5, dtype=torch.bool)
    assert just_train_twice_weights(none, 100).tolist() == [1.0] * 5
    assert just_train_twice_weights(none, "auto").tolist() == [1.0] * 5


def test_auto_lets_errors_weigh_about_as_much_as_the_rest() -> None:
    assert balancing_up_weight(ERROR) == 2
    assert just_train_twice_weights(ERROR, "auto")[ERROR].sum() == 4.0


def test_auto_never_weighs_errors_down() -> None:
    mostly_wrong = ~ERROR
    assert balancing_up_weight(mostly_wrong) == 0
    assert just_train_twice_weights(mostly_wrong, "auto").tolist() == [1.0] * 7


def test_no_examples_have_no_weights() -> None:
    assert just_train_twice_weights(torch.zeros(0, dtype=torch.bool), "auto").shape == (0,)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: just_train_twice_weights(ERROR, -1), ValueError, r"up_weight is -1, expected a number in \[0, inf\]"),
        (lambda: just_train_twice_weights(ERROR, "most"), TypeError, r"up_weight is 'most' \(str\), expected a number"),
        (lambda: just_train_twice_weights(ERROR.long(), 2), TypeError, r"error is torch.int64, expected a bool"),
        (lambda: balancing_up_weight([True]), TypeError, r"error is list, expected a bool tensor"),
        (lambda: just_train_twice_weights(ERROR[None], 2), ValueError, r"error has shape \(1, 7\), expected \(N,\)"),
    ],
)
def test_what_does_not_fit_is_refused(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
