import cv2
import numpy as np
import pytest
import torch
from skimage.data import astronaut
from skimage.metrics import structural_similarity

from pipeline.align import template
from train.data import to_pixels, to_tensor
from train.metrics import NOT_FOUND, high_frequency_energy, landmark_error, ssim


def photo(px: int = 96) -> torch.Tensor:
    small = cv2.resize(astronaut(), (px, px), interpolation=cv2.INTER_AREA)
    return to_tensor(torch.from_numpy(small)[None])


def blurred(x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.avg_pool2d(x, 3, stride=1, padding=1)


def bordered(x: torch.Tensor) -> np.ndarray:
    return np.pad((x.numpy() + 1) / 2, ((0, 0), (5, 5), (5, 5)), mode="reflect")


def test_landmark_error_is_in_inter_ocular_distances():
    expected = template()[None].astype(np.float32) * 100
    between = np.linalg.norm(expected[0, 36] - expected[0, 45])
    moved = expected + np.array([3.0, 4.0], np.float32)
    assert landmark_error(moved, expected) == pytest.approx([5 / between], rel=1e-5)
    assert landmark_error(expected, expected) == pytest.approx([0])


def test_landmark_error_of_a_face_that_was_not_found_is_one():
    expected = np.repeat(template()[None].astype(np.float32) * 100, 2, axis=0)
    error = landmark_error(np.zeros_like(expected), expected, np.array([False, True]))
    assert error[0] == NOT_FOUND
    assert error[1] > NOT_FOUND


def test_ssim_is_that_of_scikit_image_frame_by_frame():
    x = torch.cat([photo(), photo().flip(-1)])
    x_hat = torch.cat([blurred(photo()), 0.5 * photo().flip(-1)])
    ours = ssim(x_hat, x)
    for number in range(2):
        # scikit-image leaves out the border of 5 px that a window of 11 does not cover.
        theirs = structural_similarity(
            bordered(x_hat[number]),
            bordered(x[number]),
            channel_axis=0,
            data_range=1.0,
            gaussian_weights=True,
            use_sample_covariance=False,
        )
        assert ours[number].item() == pytest.approx(theirs, abs=1e-4)
    assert ssim(x, x).tolist() == pytest.approx([1, 1])


def test_ssim_of_flat_pictures_tells_dark_from_bright():
    black, grey = torch.full((1, 3, 16, 16), -1.0), torch.zeros(1, 3, 16, 16)
    assert ssim(grey, black).item() < 0.01
    assert 0.9 < ssim(grey, grey + 0.2).item() < 1


def test_high_frequency_energy_sees_detail_alone():
    assert high_frequency_energy(torch.full((1, 3, 24, 40), 0.7)).item() == pytest.approx(
        0, abs=1e-9
    )
    x = photo()
    sharp, soft = high_frequency_energy(x).item(), high_frequency_energy(blurred(x)).item()
    assert soft < 0.1 * sharp
    wave = torch.arange(32) * np.pi / 4  # a period of 8 px, half of what counts as high
    slow, fast = (torch.cos(k * wave).expand(1, 3, 24, 32) for k in (1, 3))
    assert high_frequency_energy(fast).item() > 1000 * high_frequency_energy(slow).item()


def test_pixels_and_back_change_no_metric_by_much():
    x = photo()
    back = to_tensor(torch.from_numpy(to_pixels(x)))
    assert ssim(back, x).item() > 0.999
