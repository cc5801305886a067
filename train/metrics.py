"""How good a generated frame is: pure functions of it and the frame it should be.

Every metric takes frames in [-1, 1] or landmarks in pixels, and knows no network of the loss.
"""

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure

OUTER_EYE_CORNERS = (36, 45)
NOT_FOUND = 1.0
"""The landmark error of a frame in which no face is found."""


def landmark_error(
    points: Float[np.ndarray, "n 68 2"],
    expected: Float[np.ndarray, "n 68 2"],
    found: Bool[np.ndarray, " n"] | None = None,
) -> Float[np.ndarray, " n"]:
    """NME: mean distance of the 68 points, in inter-ocular distances of the expected face.

    The inter-ocular distance is that of the outer corners of the eyes, as in 300-W.
    """
    right, left = OUTER_EYE_CORNERS
    between = np.linalg.norm(expected[:, right] - expected[:, left], axis=1)
    error = np.linalg.norm(points - expected, axis=2).mean(axis=1) / between
    return error if found is None else np.where(found, error, NOT_FOUND)


def ssim(x_hat: Float[Tensor, "n 3 h w"], x: Float[Tensor, "n 3 h w"]) -> Float[Tensor, " n"]:
    """Structural similarity of Wang et al. 2004 for each frame, 1 where they are equal.

    It compares means of brightness, so it is taken of values from 0 (black), not from -1.
    """
    found = structural_similarity_index_measure(
        (x_hat + 1) / 2, (x + 1) / 2, data_range=1.0, reduction="none"
    )
    assert isinstance(found, Tensor)
    return found


def high_frequency_energy(x: Float[Tensor, "n 3 h w"]) -> Float[Tensor, " n"]:
    """Mean power of the brightness above half the Nyquist frequency, for each frame.

    A blurred picture has little of it; it says nothing of whether the detail is right. A Hann
    window keeps the step between opposite borders out of it.
    """
    grey = x.float().mean(dim=1)
    sides = grey.shape[-2:]
    windows = [torch.hann_window(side, device=x.device) for side in sides]
    power = torch.fft.fft2(grey * torch.outer(*windows), norm="ortho").abs().square()
    rows, columns = (torch.fft.fftfreq(side, device=x.device).abs() for side in sides)
    return power[:, torch.maximum(rows[:, None], columns) > 0.25].mean(dim=1)
