"""The time left that training shows."""

import pytest

from train.progress import seconds_left


@pytest.mark.parametrize(
    ("steps_left", "steps_done", "validations_s", "left_s"),
    [
        (38, 0, [30.0], None),  # no step was timed yet
        (38, 2, [30.0], 38 * 4.0 + 2 * 30.0),  # the validation before the first step does not count as a step
        (20, 20, [30.0, 34.0], 20 * 4.0 + 32.0),
        (19, 21, [30.0, 34.0], 19 * 4.0 + 32.0),
        (0, 40, [30.0, 34.0, 32.0], 0.0),
        (10, 10, [], 40.0),  # without validation rows
    ],
)
def test_time_left_counts_steps_and_validations_separately(steps_left, steps_done, validations_s, left_s):
    """40 steps of 4 s and a validation of 30 s every 20 steps, computed by hand."""
    assert seconds_left(steps_left, steps_done, steps_done * 4.0, 20, validations_s) == left_s
