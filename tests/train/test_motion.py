"""Another face's motion, fitted: shift, turn and scale undone, eyes that close, jitter gone."""

import numpy as np
import pytest

from tests.train.shards import face_points
from train import motion
from train.motion import hold, mean_shape, smooth

PX = 128


def talking(num_frames: int = 23, tall: float = 1.0):
    """Return a face that nods to the right, blinks in frame 7 and opens its mouth."""
    frames = np.stack([face_points(PX)] * num_frames).astype(np.float64)
    frames[7::9, 36:48, 1] = frames[0, 36:48, 1].mean()
    opening = np.sin(np.linspace(0, 6, num_frames))
    frames[:, 54:60, 1] += 4 * opening[:, None]
    frames[:, :, 0] += np.linspace(-6, 6, num_frames)[:, None]
    frames[:, :, 1] *= tall
    return frames


def adapt(driver, person):
    return motion.adapt(driver, np.ones(len(driver), bool), person)


def moved(points, scale: float, degrees: float, shift: tuple[float, float]):
    turn = np.radians(degrees)
    matrix = scale * np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]])
    return points @ matrix + np.array(shift)


def test_ones_own_motion_comes_back() -> None:
    own = talking()
    assert np.abs(adapt(own, own) - own).max() < 0.5


@pytest.mark.parametrize(
    ("scale", "degrees", "shift"), [(1, 0, (31, -17)), (1.7, 0, (0, 0)), (0.6, 12, (-40, 9))]
)
def test_shift_scale_and_turn_of_the_driver_are_undone(scale, degrees, shift) -> None:
    person = face_points(PX)[None] + np.zeros((3, 1, 1), np.float32)
    expected = adapt(talking(), person)
    assert np.abs(adapt(moved(talking(), scale, degrees, shift), person) - expected).max() < 0.01


def test_a_driver_of_another_shape_does_not_bring_its_face() -> None:
    person = talking(5)
    fitted = adapt(talking(tall=1.3), person)
    assert np.abs(mean_shape(fitted) - mean_shape(person)).max() < 0.5
    assert np.abs(fitted.mean((0, 1)) - person.mean((0, 1))).max() < 0.01


def test_the_heads_motion_is_kept() -> None:
    fitted = adapt(talking(), talking(5))
    travelled = fitted[-1, 30, 0] - fitted[0, 30, 0]
    assert 11 < travelled < 13


def test_an_eye_that_closes_closes_on_a_face_with_larger_eyes() -> None:
    person = talking(4)
    eye = person[:, 36:42, 1]
    person[:, 36:42, 1] = eye.mean(axis=1, keepdims=True) + 1.6 * (eye - eye.mean())
    fitted = adapt(talking(), person)
    openness = np.ptp(fitted[:, 36:42, 1], axis=1)
    assert openness[7] < 0.15 * openness[3]


def test_held_frames_do_not_count_for_the_drivers_mean() -> None:
    driver = talking()
    held = np.concatenate([driver, np.repeat(driver[-1:], 40, axis=0)])
    found = np.arange(len(held)) < len(driver)
    fitted = motion.adapt(held, found, talking(5))
    assert np.abs(fitted[:23] - adapt(driver, talking(5))).max() < 1e-4


def test_frames_without_a_face_are_held() -> None:
    points = np.arange(6, dtype=np.float32)[:, None, None] * np.ones((6, 68, 2), np.float32)
    found = np.array([False, True, False, False, True, False])
    assert hold(points, found)[:, 0, 0].tolist() == [1, 1, 1, 1, 4, 4]
    with pytest.raises(ValueError, match="no frame of the driver shows a face"):
        hold(points, np.zeros(6, bool))


def test_smoothing_keeps_motion_without_delay_and_drops_jitter() -> None:
    random = np.random.default_rng(2)
    pts_s = np.cumsum(random.uniform(0.03, 0.05, 60))
    path = (30 * pts_s + 12 * pts_s**2)[:, None, None] * np.ones((60, 68, 2))
    assert np.abs(smooth(path, pts_s, 0.06) - path).max() < 1e-6
    jitter = random.normal(0, 1, path.shape)
    left = smooth(path + jitter, pts_s, 0.06) - path
    assert left[5:-5].std() < 0.65
    assert (smooth(jitter, pts_s, 0) == jitter).all()
