"""Decoding in a child process: a file that kills or hangs the decoder costs itself and nothing
else.

One child serves a worker for as long as both live, one video after another. It ends when the pipe
closes, and when its parent dies. Over the pipe go a JSON line one way, and a JSON header followed
by the plain bytes of the pixels the other way: what comes out of a file is never unpickled.

    python -m pipeline.isolate     the child, which only this module starts
"""

import contextlib
import ctypes
import fcntl
import json
import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import IO, Any

import numpy as np

from pipeline.config import DecodeConfig
from pipeline.decode import Decoded, SegmentFrames, decode_video
from pipeline.plan import Segment, Video
from pipeline.sample import Reject
from pipeline.storage import StorageError

MAX_DEATHS = 2
"""A video is rejected for killing this many children that had done nothing before it."""

PIPE_BYTES = 1 << 20
"""Sixteen times the usual size: frames come by in fewer turns."""

PR_SET_PDEATHSIG = 1

COMMAND = (sys.executable, "-m", "pipeline.isolate")


class ChildDiedError(Exception):
    """The child ended before it had answered; the message says how."""


class Decoder:
    """Decodes in a child process, which is started when first needed and again when it died."""

    def __init__(self, config: DecodeConfig, command: Sequence[str] = COMMAND) -> None:
        self.cpu_s = 0.0
        """CPU time that decoding has taken."""
        self._config = config
        self._command = command
        self._child: subprocess.Popen[bytes] | None = None

    def decode(self, video: Video, wanted: int, root: str = "") -> Decoded:
        """Do what `decode_video` does. Raises StorageError like it.

        A death counts only in a child that is fresh: an older one may suffer from an earlier video.
        """
        deaths: list[str] = []
        while len(deaths) < MAX_DEATHS:
            child, is_fresh = self._ready_child()
            try:
                return self._ask(child, video, wanted, root)
            except ChildDiedError as death:
                self.close()
                if is_fresh:
                    deaths.append(str(death))
        reason = f"the decoder died {len(deaths)} times: {deaths[-1]}"
        return Decoded(segments=Reject(id=video.key, stage="decode", reason=reason))

    def close(self) -> None:
        """End the child, if there is one."""
        if self._child is not None:
            self._child.kill()
            self._child.communicate()
            self._child = None

    def _ready_child(self) -> tuple[subprocess.Popen[bytes], bool]:
        """Take the living child, else start one; and say whether it is fresh."""
        if self._child is not None and self._child.poll() is None:
            return self._child, False
        self.close()
        command = [*self._command, str(os.getpid())]
        self._child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        with contextlib.suppress(OSError):  # a user may have used up what pipes may hold
            fcntl.fcntl(_out(self._child), fcntl.F_SETPIPE_SZ, PIPE_BYTES)
        return self._child, True

    def _ask(self, child: subprocess.Popen[bytes], video: Video, wanted: int, root: str) -> Decoded:
        """Send a request and read the answer; raises ChildDiedError if none comes."""
        request = {
            "video": asdict(video),
            "wanted": wanted,
            "root": root,
            "config": asdict(self._config),
        }
        late = threading.Event()
        watchdog = threading.Timer(self._config.wall_deadline_s, _end, (child, late))
        watchdog.daemon = True
        watchdog.start()
        try:
            _in(child).write(json.dumps(request).encode() + b"\n")
            _in(child).flush()
            return self._receive(_out(child))
        except (BrokenPipeError, EOFError):
            raise ChildDiedError(self._how_it_ended(child, late.is_set())) from None
        finally:
            watchdog.cancel()

    def _receive(self, pipe: IO[bytes]) -> Decoded:
        """Read an answer: length of the header, header, then the pixels of each segment."""
        header = json.loads(_read(pipe, int.from_bytes(_read(pipe, 8), "little")))
        self.cpu_s += header["cpu_s"]
        if "storage" in header:
            raise StorageError(header["storage"])
        damaged = tuple(Reject(**d) for d in header["damaged"])
        if "reject" in header:
            return Decoded(segments=Reject(**header["reject"]), damaged=damaged)
        return Decoded(
            segments=tuple(_segment(f, pipe) for f in header["segments"]), damaged=damaged
        )

    def _how_it_ended(self, child: subprocess.Popen[bytes], was_late: bool) -> str:
        code = child.wait()
        if was_late:
            return f"no answer within {self._config.wall_deadline_s:g} s"
        if code == -signal.SIGPROF:
            return f"more than {self._config.cpu_deadline_s:g} s of CPU time"
        return signal.Signals(-code).name if code < 0 else f"exit status {code}"


def _end(child: subprocess.Popen[bytes], late: threading.Event) -> None:
    late.set()
    child.kill()


def _in(child: subprocess.Popen[bytes]) -> IO[bytes]:
    assert child.stdin is not None
    return child.stdin


def _out(child: subprocess.Popen[bytes]) -> IO[bytes]:
    assert child.stdout is not None
    return child.stdout


def _read(pipe: IO[bytes], num_bytes: int) -> bytes:
    data = pipe.read(num_bytes)
    if len(data) < num_bytes:
        raise EOFError
    return data


def _segment(facts: dict[str, Any], pipe: IO[bytes]) -> SegmentFrames:
    """Read the pixels of one segment straight into their array."""
    pixels = np.empty(facts["shape"], np.uint8)
    rest = pixels.data.cast("B")
    while rest:
        count = pipe.readinto(rest)  # type: ignore[attr-defined]
        if not count:
            raise EOFError
        rest = rest[count:]
    return SegmentFrames(
        segment=facts["segment"],
        pixels=pixels,
        pts_s=np.array(facts["pts_s"], np.float64),
        original=facts["original"],
    )


def serve(decode: Callable[..., Decoded] = decode_video) -> None:
    """Answer requests until the pipe closes."""
    _die_with(int(sys.argv[1]))
    # Only answers go to the pipe: what a library prints goes where errors go.
    with os.fdopen(os.dup(1), "wb") as answers:
        os.dup2(2, 1)
        for line in sys.stdin.buffer:
            request = json.loads(line)
            config = DecodeConfig(**request["config"])
            # The kernel counts, and ends a decoder that is lost in C as well.
            signal.setitimer(signal.ITIMER_PROF, config.cpu_deadline_s)
            start_s = _cpu_s()
            header: dict[str, Any] = {}
            decoded = Decoded(segments=())
            try:
                decoded = decode(
                    _video(request["video"]), request["wanted"], config, request["root"]
                )
            except StorageError as error:
                header["storage"] = str(error)
            signal.setitimer(signal.ITIMER_PROF, 0)
            _answer(answers, {**header, "cpu_s": _cpu_s() - start_s}, decoded)


def _answer(answers: IO[bytes], header: dict[str, Any], decoded: Decoded) -> None:
    """Write the header with its length, then the pixels."""
    header["damaged"] = [asdict(d) for d in decoded.damaged]
    segments: Sequence[SegmentFrames] = ()
    if isinstance(decoded.segments, Reject):
        header["reject"] = asdict(decoded.segments)
    else:
        segments = decoded.segments
        header["segments"] = [
            {
                "segment": s.segment,
                "original": s.original,
                "shape": s.pixels.shape,
                "pts_s": s.pts_s.tolist(),
            }
            for s in segments
        ]
    text = json.dumps(header).encode()
    answers.write(len(text).to_bytes(8, "little") + text)
    for segment in segments:
        answers.write(segment.pixels.data)
    answers.flush()


def _video(facts: dict[str, Any]) -> Video:
    return Video(**{**facts, "segments": tuple(Segment(**s) for s in facts["segments"])})


def _cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def _die_with(parent: int) -> None:
    """Have the kernel end this process when its parent dies, even while it is busy decoding."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it was gone before the kernel was told
        sys.exit(1)


if __name__ == "__main__":
    serve()
