"""How far a build is, in a terminal or in a log; and what it came to."""

import threading
import time
from collections.abc import Callable, Mapping
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from pipeline.shard import Index, Manifest

POLL_S = 2.0
"""Pause between two looks into the output folder."""

LINE_S = 30.0
"""Pause between two lines in a log."""

ReadDone = Callable[[Mapping[str, Manifest]], dict[str, Manifest]]
"""Adds the manifests that have appeared since to those already known."""


class Watch:
    """Shows a build's progress from the manifests that appear in its output folder.

    The folder is the one place that knows, whichever nodes do the work. A thread looks there; the
    build itself keeps the main thread, which gets the signals.
    """

    def __init__(
        self, console: Console, done: Mapping[str, Manifest], num_shards: int, read_done: ReadDone
    ) -> None:
        self._console = console
        self._done = dict(done)
        self._num_before = len(done)
        self._num_shards = num_shards
        self._read_done = read_done
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._started_s = time.monotonic()

    def __enter__(self) -> "Watch":
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        show = self._bar if self._console.is_terminal else self._lines
        show()

    def _bar(self) -> None:
        with Progress(
            TextColumn("shards"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[facts]}"),
            TimeRemainingColumn(elapsed_when_finished=True),
            console=self._console,
        ) as progress:
            task = progress.add_task("", total=self._num_shards, facts="")
            is_last = False
            while not is_last:
                is_last = self._stop.wait(POLL_S)
                self._done = self._read_done(self._done)
                progress.update(task, completed=len(self._done), facts=self._facts())

    def _lines(self) -> None:
        while not self._stop.wait(LINE_S):
            self._done = self._read_done(self._done)
            built = len(self._done) - self._num_before
            spent_s = time.monotonic() - self._started_s
            left_s = spent_s / built * (self._num_shards - len(self._done)) if built else None
            eta = f", {as_time(left_s)} left" if left_s is not None else ""
            self._console.print(
                f"shards {len(self._done)}/{self._num_shards}, {self._facts()}{eta}", soft_wrap=True
            )

    def _facts(self) -> str:
        videos = sum(len(m.videos) for m in self._done.values())
        rejects = sum(len(m.rejects) for m in self._done.values())
        return f"{videos} videos, {rejects} rejected"


def as_time(seconds: float) -> str:
    """Write a duration as h:mm:ss."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


def summary(
    index: Index,
    num_held_out: int,
    cpu_s: Mapping[str, float],
    num_built: int,
    wall_s: float,
    num_cpus: float,
) -> Table:
    """Tabulate what a build came to, and what this run of it took.

    num_held_out is how many videos were planned for the val split.
    """
    totals = index.totals
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_row("persons", f"{totals['persons']:,}")
    for split in ("train", "val"):
        videos = index.of_split(split)
        frames = sum(v.num_frames for v in videos)
        table.add_row(f"{split} videos", f"{len(videos):,} with {frames:,} frames")
    if num_held_out and not index.of_split("val"):
        table.add_row(
            "[yellow]warning[/]",
            f"all {num_held_out:,} videos of the val split were rejected: no person is held out. "
            "Another --seed, in another --output, holds out others",
        )
    table.add_row("shards", f"{totals['shards']:,} with {totals['bytes'] / 1e6:,.1f} MB")
    table.add_row("rejected", f"{totals['rejected']:,} of {totals['planned']:,} videos")
    for stage, reason, count in index.reasons():
        table.add_row("", f"{count:,}  {stage}: {reason}")
    if index.damaged_files:
        table.add_row("damaged files", f"{totals['damaged_files']:,}")
    if num_built:
        total_s = sum(cpu_s.values())
        shares = ", ".join(f"{stage} {s / total_s:.0%}" for stage, s in cpu_s.items())
        table.add_row("this run", f"{num_built:,} videos in {as_time(wall_s)}")
        table.add_row("", f"{num_built / wall_s:.2f} videos/s")
        table.add_row("CPU time", f"{as_time(total_s)}: {shares}")
        table.add_row("CPUs busy", f"{total_s / (wall_s * num_cpus):.0%} of {num_cpus:g}")
    return table
