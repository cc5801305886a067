"""A driver's landmarks -> the person's: held, smoothed over time, and fitted to another face.

Landmarks say who as well as how: drawn as they are, a driver's jaw comes with the motion. So what
is carried over is how the driver's face differs from its own mean, sized for the person's face.
"""

import numpy as np
from jaxtyping import Bool, Complex, Float, Float64

PARTS = (
    slice(0, 17),  # jaw
    slice(17, 22),
    slice(22, 27),  # brows
    slice(27, 36),  # nose
    slice(36, 42),
    slice(42, 48),  # eyes
    slice(48, 68),  # mouth
)
MOST_STRETCH = 2.0
"""A part's motion is stretched at most so much more, or less, than the face's."""

SETTLED = 20  # rounds of the mean shape, far more than it takes

Points = Float[np.ndarray, "n 68 2"]
Sources = Float[np.ndarray, "t 68 2"]
Shape = Float[np.ndarray, "68 2"]


def hold(points: Points, found: Bool[np.ndarray, " n"]) -> Points:
    """Let frames without a face keep the face before them; the first ones take the first found."""
    if not found.any():
        raise ValueError("no frame of the driver shows a face: give a video of one")
    known = np.flatnonzero(found)
    last = np.searchsorted(known, np.arange(len(points)), side="right") - 1
    return points[known[np.maximum(last, 0)]]


def smooth(points: Points, pts_s: Float64[np.ndarray, " n"], width_s: float) -> Points:
    """Smooth over time, without delay: around each frame fit a parabola, weighted by a Gaussian.

    `width_s` is the Gaussian's standard deviation in seconds of the film, so uneven frame times are
    respected. Steady and accelerated motion pass unchanged; jitter from frame to frame doesn't.
    """
    if width_s == 0:
        return points
    flat = points.reshape(len(points), -1).astype(np.float64)
    smoothed = np.empty_like(flat)
    for i, now in enumerate(pts_s):
        first, last = np.searchsorted(pts_s, [now - 3 * width_s, now + 3 * width_s])
        time = (pts_s[first:last] - now) / width_s
        weight = np.exp(-(time**2) / 4)[:, None]  # its square is the Gaussian
        powers = np.stack([np.ones_like(time), time, time**2], axis=1)
        fitted, *_ = np.linalg.lstsq(powers * weight, flat[first:last] * weight, rcond=None)
        smoothed[i] = fitted[0]
    return smoothed.reshape(points.shape).astype(points.dtype)


def adapt(driver: Points, found: Bool[np.ndarray, " n"], person: Sources) -> Points:
    """Carry the driver's motion over to a person's face, in pixels of the person's pictures.

    Turns of the head in the plane, its nearing and its shifts are kept relative to the driver's
    mean; what the face itself does is sized part by part, so that an eye that closes closes. The
    mean is that of the frames in which a face was found. The result doesn't change when the driver
    is shifted, turned or scaled as a whole.
    """
    to_mean = mean_shape(person)
    way_back, _ = _fit(mean_shape(driver[found])[None], to_mean)
    driver = driver @ np.linalg.inv(way_back)  # the person's size and tilt, as a whole
    from_mean = mean_shape(driver[found])
    way_back, fitted = _fit(driver, from_mean)
    shapes = to_mean + _resized(fitted - from_mean, from_mean, to_mean)
    centres = driver.mean(axis=1, keepdims=True)
    place = centres - centres[found].mean(axis=0) + person.mean(axis=(0, 1))
    return (shapes @ way_back + place).astype(np.float32)


def mean_shape(points: Points) -> Shape:
    """Return the mean of the shapes, centred, after turning and scaling each to fit the mean."""
    centred = points - points.mean(axis=1, keepdims=True)
    mean = centred.mean(axis=0)
    size = np.mean([_size(shape) for shape in centred])
    for _ in range(SETTLED):
        fitted = _fit(points, mean)[1].mean(axis=0)
        mean = fitted * (size / _size(fitted))
    return mean


def _fit(points: Points, mean: Shape) -> tuple[Float[np.ndarray, "n 2 2"], Points]:
    """Turn and scale centred shapes to fit the mean: shape = fitted shape @ way back.

    In complex numbers the best fit is a single division.
    """
    shapes = _complex(points - points.mean(axis=1, keepdims=True))
    target = _complex(mean)
    back = (shapes * target.conj()).sum(axis=1) / (np.abs(target) ** 2).sum()
    fitted = shapes / back[:, None]
    way_back = np.array([[back.real, back.imag], [-back.imag, back.real]]).transpose(2, 0, 1)
    return way_back, np.stack([fitted.real, fitted.imag], axis=-1)


def _complex(points: Float[np.ndarray, "*n 2"]) -> Complex[np.ndarray, "*n"]:
    return points[..., 0] + 1j * points[..., 1]


def _resized(motion: Points, from_mean: Shape, to_mean: Shape) -> Points:
    """Stretch a part's own motion by how much larger the part is; its centre moves as it did."""
    resized = np.empty_like(motion)
    for part in PARTS:
        centre = motion[:, part].mean(axis=1, keepdims=True)
        stretch = np.ptp(to_mean[part], axis=0) / np.maximum(np.ptp(from_mean[part], axis=0), 1e-6)
        own = (motion[:, part] - centre) * stretch.clip(1 / MOST_STRETCH, MOST_STRETCH)
        resized[:, part] = centre + own
    return resized


def _size(shape: Shape) -> float:
    """Return the root mean square distance of a shape's points from their centre."""
    return float(np.sqrt(((shape - shape.mean(axis=0)) ** 2).sum(axis=1).mean()))
