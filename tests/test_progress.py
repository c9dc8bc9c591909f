"""What training shows of its progress: the time left, and the loss curve."""

import pytest

from train.plot import draw_losses
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


@pytest.mark.parametrize(("after", "labels"), [(2.5, {"before 3.000", "best 2.500"}), (3.5, {"before 3.000"})])
def test_the_loss_curve_names_the_first_and_the_best_validation(after, labels):
    """A run that did not improve has no best."""
    from matplotlib.figure import Figure

    axes = Figure().subplots()
    draw_losses(axes, [{"step": 0, "val_loss": 3.0}, {"step": 10, "val_loss": after}], "a run")

    assert {text.get_text() for text in axes.texts} == labels
