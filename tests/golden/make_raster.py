"""Make the reference rasters: the landmarks of a real face and how they are drawn at 256 and 64 px.

    python tests/golden/make_raster.py

Writes raster.json (68 points at 256 px) and raster_256.png, raster_64.png beside itself. To be run
again, and looked at, only when rasters are meant to change: every shard and checkpoint made before
is then another kind.
"""

import json
from pathlib import Path

import cv2
from skimage.data import astronaut

from pipeline.align import DlibAligner
from pipeline.crop import square_of, to_crop
from pipeline.rasterize import draw, round_points

GOLDEN = Path(__file__).parent


def main() -> None:
    """Find the astronaut's landmarks and draw them."""
    found = DlibAligner().landmarks(astronaut()[None])
    points = round_points(to_crop(found.points[0], square_of(found.points, 0.4), 256))
    (GOLDEN / "raster.json").write_text(json.dumps(points.tolist()) + "\n")
    for image_px in (256, 64):
        raster = draw(points * (image_px / 256), image_px)
        cv2.imwrite(str(GOLDEN / f"raster_{image_px}.png"), raster[..., ::-1])


if __name__ == "__main__":
    main()
