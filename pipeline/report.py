"""Finished shards -> report.html: what was built, as one page that a person looks at.

    segment -> frames -> landmarks -> raster -> sample -> shard -> [report]

    python pipeline/report.py data/shards

Reads the index and a bounded number of videos, so a page costs the same for ten videos and for a
hundred thousand. All of it is in the one file: no scripts, nothing from the web.
"""

import base64
import hashlib
import html
import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import cv2
import numpy as np
from jaxtyping import Float64, UInt8

from pipeline.faces import evenly
from pipeline.rasterize import PALETTE
from pipeline.sample import Reject, Sample, from_fields, key_of, read_facts
from pipeline.shard import Index, VideoEntry, read_span, samples_in_span
from pipeline.storage import write_file

REPORT = "report.html"

MAX_MEASURED = 200
"""Videos whose landmarks are measured, chosen by a hash of their names."""

MAX_SUSPECTS = 6
"""Videos that are shown because they are the oddest that were measured, with four frames each."""

MAX_OTHERS = 48
"""Videos that are shown beside them, with two frames each: about 18 kB of the page."""

MAX_REJECTS = 100
"""Rejects that are listed by name; the rest are in rejects.jsonl."""

THUMB_PX = 144

JPEG_URL = "data:image/jpeg;base64,"

RIGID = [0, 16, 27, 28, 29, 30, 36, 39, 42, 45]
"""Points that move with the skull: ears, nose bridge, corners of the eyes."""


class Markup(str):
    """Text that is HTML already."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Measured:
    """A video's stored frames in numbers: n sets of landmarks as shares of the picture, scores."""

    entry: VideoEntry
    points: Float64[np.ndarray, "n 68 2"]
    scores: Float64[np.ndarray, "n"]
    span: bytes

    @cached_property
    def sizes(self) -> Float64[np.ndarray, "n"]:
        """The longer side of the landmarks' box, as a share of the picture's side."""
        return (self.points.max(axis=1) - self.points.min(axis=1)).max(axis=1)

    @cached_property
    def yaws_deg(self) -> Float64[np.ndarray, "n"]:
        """Turn of the head, estimated from where the nose lies between the sides of the jaw.

        Positive to the right of the picture. Right in sign and order, no more.
        """
        nose = self.points[:, 30, 0]
        right, left = nose - self.points[:, 2, 0], self.points[:, 14, 0] - nose
        ratio = (right - left) / np.maximum(np.abs(right) + np.abs(left), 1e-6)
        return np.degrees(np.arcsin(ratio))

    @cached_property
    def strays(self) -> Float64[np.ndarray, "n"]:
        """How far the skull's points stray from the video's mean shape, in eye distances (RMS).

        After the best shift, turn and scale; a turning head counts a little, bad landmarks a lot.
        It is no measure of jitter: stored frames are tenths of a second apart or more, in which a
        head moves further than landmarks tremble.
        """
        shapes = normalised(self.points[:, RIGID])
        mean = shapes.mean(axis=0)
        eyes = abs(mean[RIGID.index(45)] - mean[RIGID.index(36)])
        return np.sqrt((np.abs(shapes - mean) ** 2).mean(axis=1)) / eyes


def normalised(points: Float64[np.ndarray, "n m 2"]) -> np.ndarray:
    """Lay point sets over the first: complex (n, m), centred, of one size, turned to fit."""
    shapes = points[..., 0] + 1j * points[..., 1]
    shapes = shapes - shapes.mean(axis=1, keepdims=True)
    shapes = shapes / np.linalg.norm(shapes, axis=1, keepdims=True)
    turn = (shapes.conj() * shapes[0]).sum(axis=1, keepdims=True)
    return shapes * turn / np.abs(turn)


def write_report(folder: str) -> None:
    """Write report.html into a folder of finished shards.

    Raises ValueError when the folder has no index, or a shard isn't as the index says.
    """
    index = Index.load(folder)
    measured = [measure(folder, index, entry) for entry in choose(index.videos, MAX_MEASURED)]
    write_file(folder, REPORT, page(index, measured).encode())


def choose(videos: Sequence[VideoEntry], count: int) -> list[VideoEntry]:
    """Choose videos by a hash of their keys: the same ones each time, of all kinds."""
    return sorted(videos, key=lambda v: hashlib.blake2b(v.key.encode()).digest())[:count]


def measure(folder: str, index: Index, entry: VideoEntry) -> Measured:
    """Read one video's landmarks and scores."""
    span = read_span(folder, entry)
    frames = sorted(samples_in_span(span).items())
    facts = [read_facts(entry.key, fields["json"]) for _, fields in frames]
    return Measured(
        entry=entry,
        points=np.array([f["landmarks"] for f in facts], np.float64) / index.face.image_px,
        scores=np.array([f["score"] for f in facts], np.float64),
        span=span,
    )


def page(index: Index, measured: Sequence[Measured]) -> str:
    """Lay the page out."""
    num_suspects = min(MAX_SUSPECTS, len(measured) // 4)
    suspects = sorted(measured, key=lambda m: -m.strays.max())[:num_suspects]
    unsuspected = [m for m in measured if m not in suspects]
    others = sorted(unsuspected[:MAX_OTHERS], key=lambda m: m.entry.key)
    parts = [
        header(index),
        section("In numbers", histograms(measured), note_on(index, measured)),
        section(
            "Look at these first",
            "".join(strip(m, index, 4) for m in suspects),
            "The videos in which the landmarks of some frame differ most from the others: strong "
            "turns of the head, or landmarks that are wrong. The first frame shown is the oddest.",
        ),
        section(
            "Faces and rasters",
            "".join(strip(m, index, 2) for m in others),
            f"{len(others)} videos. Landmarks are drawn over the stored frame; beside it is its "
            "raster, which is what drives the networks.",
        ),
        section("Rejected", rejects(index), ""),
        section("How it was made", provenance(index), ""),
    ]
    return TEMPLATE.replace("$STYLE", STYLE).replace("$BODY", "".join(p for p in parts if p))


def section(title: str, body: str, note: str) -> str:
    """Put a titled part of the page together, or nothing if it is empty."""
    if not body:
        return ""
    note = f"<p class=note>{html.escape(note)}</p>" if note else ""
    return f"<section><h2>{title}</h2>{note}<div class=body>{body}</div></section>"


def header(index: Index) -> str:
    """Say what there is, in large figures."""
    totals = index.totals
    num_val = len(index.of_split("val"))
    figures = [
        (f"{totals['accepted']:,}", f"videos of {totals['planned']:,}"),
        (f"{totals['rejected']:,}", "rejected"),
        (f"{totals['persons']:,}", "persons"),
        (f"{num_val:,}", "videos held out"),
        (f"{totals['frames']:,}", "frames"),
        (f"{totals['bytes'] / 1e6:,.1f} MB", f"in {totals['shards']:,} shards"),
    ]
    tiles = "".join(f"<div><b>{value}</b><span>{what}</span></div>" for value, what in figures)
    face = index.face
    return (
        f"<header><h1>Shards</h1><p>{face.image_px} px faces, landmarks by "
        f"{html.escape(face.backend)} ({html.escape(face.detector)})</p>"
        f"<div class=figures>{tiles}</div></header>"
    )


def note_on(index: Index, measured: Sequence[Measured]) -> str:
    """Say how much of the data the figures stand for."""
    if len(measured) == len(index.videos):
        frames = "Every stored frame."
    else:
        frames = (
            f"The frames of {len(measured)} videos out of {len(index.videos):,}, chosen by a hash."
        )
    return (
        f"{frames} A face's distance from its video's mean shape tells turned heads and wrong "
        "landmarks; stored frames are too far apart in time to tell how much landmarks tremble."
    )


def histograms(measured: Sequence[Measured]) -> str:
    """Draw the distributions that tell a good build from a bad one."""
    if not measured:
        return ""
    charts = [
        ("Size of the face", "% of the picture", [100 * m.sizes for m in measured]),
        ("Turn of the head", "degrees, about", [m.yaws_deg for m in measured]),
        ("Score", "of the backend", [m.scores for m in measured]),
        ("Distance from the mean shape", "% of eye distance", [100 * m.strays for m in measured]),
    ]
    drawn = (histogram(np.concatenate(values), title, unit) for title, unit, values in charts)
    return f"<div class=charts>{''.join(drawn)}</div>"


def histogram(values: Float64[np.ndarray, "n"], title: str, unit: str, num_bins: int = 28) -> str:
    """Draw one distribution as an SVG of 280 x 130, its median marked."""
    low, median, high = (float(v) for v in np.percentile(values, [0, 50, 100]))
    high = high if high > low else low + 1
    counts, _ = np.histogram(values, num_bins, (low, high))
    width, base = 280 / num_bins, 104
    bars = "".join(
        f"<rect x={i * width:.1f} y={base - 84 * count / counts.max():.1f} "
        f"width={width - 1.5:.1f} height={84 * count / counts.max():.1f} />"
        for i, count in enumerate(counts)
    )
    middle = 280 * (median - low) / (high - low)
    return (
        f"<figure><figcaption>{title}<small> {unit}</small></figcaption>"
        f"<svg viewBox='0 0 280 130' role=img aria-label='{title}'>{bars}"
        f"<line x1={middle:.1f} x2={middle:.1f} y1=14 y2={base} />"
        f"<text x=0 y=124>{low:.3g}</text><text x=280 y=124 text-anchor=end>{high:.3g}</text>"
        f"<text class=median x={np.clip(middle, 24, 256):.1f} y=10 text-anchor=middle>"
        f"{median:.3g}</text></svg></figure>"
    )


def strip(measured: Measured, index: Index, num_shown: int) -> str:
    """Show some frames of a video: landmarks over the picture, and the raster beside it."""
    entry = measured.entry
    frames = sorted(samples_in_span(measured.span).items())
    oddest = int(measured.strays.argmax())
    chosen = [oddest, *(i for i in evenly(len(frames), num_shown) if i != oddest)][:num_shown]
    samples = [
        from_fields(key_of(entry.person, entry.video, frames[i][0]), frames[i][1]) for i in chosen
    ]
    pictures = np.hstack([half for s in samples for half in (overlay(s), thumb(s.raster))])
    name = html.escape(entry.key)
    facts = (
        f"{entry.num_frames} frames, score {np.median(measured.scores):.2f}, "
        f"{100 * np.median(measured.strays):.1f} % from the mean shape, {html.escape(entry.shard)}"
    )
    return (
        f"<figure class='strip frames{num_shown}'><figcaption>{name} "
        f"<i class={entry.split}>{entry.split}</i><small>{facts}</small></figcaption>"
        f"<img loading=lazy width={pictures.shape[1]} height={THUMB_PX} alt='{name}' "
        f"src='{data_url(pictures)}'></figure>"
    )


def overlay(sample: Sample) -> UInt8[np.ndarray, "t t 3"]:
    """Draw a frame's landmarks over it as dots in the colours of the raster."""
    scale = THUMB_PX / len(sample.frame)
    picture = thumb(sample.frame)
    places = np.round(sample.landmarks * scale * 8 - 4).astype(int)
    for stroke in PALETTE:
        for x, y in places[stroke.first : stroke.last + 1].tolist():
            cv2.circle(picture, (x, y), 10, stroke.rgb, -1, cv2.LINE_AA, 3)
    return picture


def thumb(picture: UInt8[np.ndarray, "p p 3"]) -> UInt8[np.ndarray, "t t 3"]:
    """Shrink a picture to the size shown."""
    small = cv2.resize(picture, (THUMB_PX, THUMB_PX), interpolation=cv2.INTER_AREA)
    return small.astype(np.uint8, copy=False)


def data_url(picture: UInt8[np.ndarray, "h w 3"]) -> str:
    """Put a picture into the page itself, as a JPEG."""
    _, data = cv2.imencode(".jpg", picture[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 82])
    return JPEG_URL + base64.b64encode(data.tobytes()).decode()


def rejects(index: Index) -> str:
    """List what was refused, counted by reason and then by name."""
    if not index.rejects and not index.damaged_files:
        return "<p>Nothing: every video gave frames.</p>"
    counts = table(
        ("videos", "stage", "reason"),
        [(f"{count:,}", stage, reason) for stage, reason, count in index.reasons()],
    )
    named = [("video", r) for r in index.rejects] + [("file", r) for r in index.damaged_files]
    rows = [
        (what, reject.id, reject.stage, reject.reason, _picture(reject))
        for what, reject in named[:MAX_REJECTS]
    ]
    more = len(named) - len(rows)
    rest = f"<p class=note>{more:,} more are in rejects.jsonl.</p>" if more else ""
    return counts + table(("what", "id", "stage", "reason", "middle frame"), rows) + rest


def _picture(reject: Reject) -> Markup:
    """Show what a rejected video looked like, where a frame was seen."""
    if not reject.thumbnail:
        return Markup("")
    name = html.escape(reject.id)
    return Markup(f"<img alt='{name}' src='{JPEG_URL}{html.escape(reject.thumbnail)}'>")


def provenance(index: Index) -> str:
    """List all that decides the bytes of the shards."""
    facts = {"face": index.face.to_dict(), "settings": index.config, "made by": index.provenance}
    rows = [
        (group, name, value if isinstance(value, str) else json.dumps(value))
        for group, values in facts.items()
        for name, value in values.items()
    ]
    return table((), rows)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Build a table of text, which is escaped, and Markup, which is not."""
    titles = f"<tr>{''.join(f'<th>{html.escape(title)}' for title in head)}</tr>" if head else ""
    lines = "".join(f"<tr>{''.join(f'<td>{_cell(cell)}' for cell in row)}</tr>" for row in rows)
    return f"<div class=scroll><table>{titles}{lines}</table></div>"


def _cell(content: str) -> str:
    return content if isinstance(content, Markup) else html.escape(content)


STYLE = """
:root { color-scheme: light dark; --ink: #1d2330; --soft: #69707f; --line: #dfe3ea; --back: #f6f7f9;
  --card: #fff; --mark: #3b6fd4; --warm: #c2542d }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ef; --soft: #98a0b0; --line: #2d3340;
  --back: #14171d; --card: #1c2028; --mark: #6f9cf0; --warm: #e58a63 } }
* { box-sizing: border-box }
body { margin: 0 auto; padding: 40px 24px 80px; max-width: 1216px; background: var(--back);
  color: var(--ink); font: 15px/1.5 system-ui, sans-serif }
h1 { margin: 0; font-size: 34px; letter-spacing: -.02em }
h2 { margin: 48px 0 4px; font-size: 20px }
header p, .note, small { color: var(--soft) }
header p { margin: 2px 0 24px } .note { margin: 0 0 16px; max-width: 75ch }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px }
.figures div, figure, table { background: var(--card); border: 1px solid var(--line);
  border-radius: 10px }
.figures div { padding: 14px 16px }
.figures b { display: block; font-size: 25px; line-height: 1.2; font-variant-numeric: tabular-nums }
.figures span { color: var(--soft) }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(250px, 1fr)); gap: 12px }
figure { margin: 0; padding: 12px 14px }
figcaption { font-weight: 600; overflow-wrap: anywhere } small { font-weight: 400; font-size: 13px }
svg { width: 100%; margin-top: 8px; fill: var(--mark) }
svg line { stroke: var(--warm); stroke-width: 1.5; stroke-dasharray: 3 3 }
svg text { fill: var(--soft); font-size: 11px } svg .median { fill: var(--warm) }
.strip small { display: block }
.body { display: grid; gap: 12px;
  grid-template-columns: repeat(auto-fill, minmax(min(480px, 100%), 1fr)) }
.body > :not(.frames2) { grid-column: 1 / -1 }
.strip img { display: block; width: 100%; height: auto; margin-top: 8px; border-radius: 6px }
i { font: 600 11px system-ui; padding: 1px 7px; border-radius: 9px; margin-left: 4px;
  background: var(--line); color: var(--soft) } i.val { background: var(--warm); color: #fff }
.scroll { overflow-x: auto }
table { border-spacing: 0; font-size: 14px; width: 100% }
td, th { padding: 6px 14px; text-align: left; vertical-align: top; overflow-wrap: anywhere }
tr + tr td { border-top: 1px solid var(--line) } th { color: var(--soft); font-weight: 600 }
td img { display: block; border-radius: 4px }
td:first-child { color: var(--soft) }
"""

TEMPLATE = """<!doctype html>
<html lang=en><head><meta charset=utf-8><meta name=viewport content="width=device-width">
<title>Shards</title><style>$STYLE</style></head><body>$BODY</body></html>
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Write the report of the folder that is given."""
    arguments = sys.argv[1:] if argv is None else argv
    if len(arguments) != 1:
        raise SystemExit("Usage: report.py FOLDER, for instance data/shards")
    write_report(arguments[0])
    print(f"{arguments[0]}/{REPORT}")


if __name__ == "__main__":
    main()
