"""Raw video -> shards, on one machine or on a Ray cluster.

    python pipeline/build_shards.py --input VIDEOS --output SHARDS
    ray submit cluster.yaml pipeline/build_shards.py -- --input s3://B/in --output s3://B/shards

Finds the faces and landmarks of the people in a folder of videos, and writes them as WebDataset
shards with an index. The same command again finishes what is missing: a shard is done when its
manifest is there and its tar has the size that the manifest says; only --verify reads and hashes
them. What is built is a function of the videos and the settings alone: the same bytes on any number
of machines, after any number of kills.
"""

import dataclasses
import functools
import json
import logging
import pickle
import re
import signal
import socket
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray
import tyro
from ray.data import ActorPoolStrategy, DataContext, Datasink
from ray.data.block import Block, BlockAccessor
from ray.data.exceptions import SystemException
from ray.exceptions import (
    OutOfMemoryError,
    RayActorError,
    RayError,
    WorkerCrashedError,
)
from rich.console import Console
from rich.markup import escape

from pipeline import ledger, stages
from pipeline.align import identify
from pipeline.config import BuildConfig, FaceSpec
from pipeline.faces import face_spec
from pipeline.plan import Plan, Shard, find_videos, make_plan
from pipeline.progress import Watch, summary
from pipeline.report import REPORT, write_report
from pipeline.shard import INDEX, REJECTS, Index
from pipeline.stages import Align, Builder, Work
from pipeline.storage import absolute, hold, join

FAN_CPU_S = 0.5
"""What a frame costs fan and its detector on one CPU core, roughly."""

RETRIES = 2
"""How often a stage is tried again on a shard after its process or node has died. Ray's own default
is for ever, which a video that kills its worker each time would take it at."""

RESTARTS = 8
"""How often an actor is started again: it meets many shards in its life."""

FAILURES_IN_A_ROW = 3
"""Shards that an actor may fail one after another: then the fault is its own, and it would go
through all the others."""

Row = dict[str, Any]
"""What travels through the graph: one shard's work, packed by `to_row`, in a block of its own."""

TOLD = re.compile(r"^(?!ray\.)[\w.]+(?:Error|Exception): (.+)$", re.MULTILINE)
"""An exception's last line in a traceback: all that Ray leaves of those that it wraps."""

ANSWER_S = 10.0
"""How long to wait for the Ray that --ray-address names."""

BOOTSTRAP = "~/ray_bootstrap_config.yaml"
"""What `ray up` leaves on the head of a cluster."""


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What the stages reserve of the cluster: the only resource numbers of the job."""

    num_aligners: int
    aligner_cpus: float
    aligner_gpus: float
    task_cpus: float
    device: str

    @classmethod
    def of(cls, cluster: Mapping[str, float], config: BuildConfig) -> "Resources":
        """Divide a cluster so that aligners can't take every CPU: decoding would wait for ever."""
        num_cpus, num_gpus = max(1, int(cluster.get("CPU", 1))), int(cluster.get("GPU", 0))
        may_use_gpu = config.align.backend == "fan" and config.align.device != "cpu"
        if may_use_gpu and (num_gpus or config.align.device == "cuda"):
            # A network fills a GPU by itself and takes next to no CPU, which decoding needs whole.
            return cls(
                num_aligners=max(1, num_gpus),
                aligner_cpus=0,
                aligner_gpus=1,
                task_cpus=1,
                device="cuda",
            )
        # An actor a core, holding half of it, leaves half for the writing: whichever has work takes
        # the core, and neither keeps the other from starting.
        return cls(
            num_aligners=num_cpus, aligner_cpus=0.5, aligner_gpus=0, task_cpus=0.5, device="cpu"
        )


def run_graph(
    shards: Sequence[Shard], config: BuildConfig, spec: FaceSpec, resources: Resources
) -> "ShardSink":
    """Build the shards. Every stage is 1:1, and one row is one shard."""
    settings = DataContext.get_current()
    settings.target_max_block_size = None  # a row is never split
    settings.enable_progress_bars = False  # Watch shows videos and rejects instead of blocks

    # 1. plan: the shards to be built, a few kB each.
    rows = [to_row(Work(shard=shard)) for shard in shards]
    work = ray.data.from_items(rows, override_num_blocks=len(rows))

    config = dataclasses.replace(
        config, align=dataclasses.replace(config.align, device=resources.device)
    )
    # Classes, as actors need: Ray annotates functions alone.
    actors: dict[str, Any] = {
        "num_cpus": resources.aligner_cpus,
        "num_gpus": resources.aligner_gpus,
        "compute": ActorPoolStrategy(size=min(resources.num_aligners, len(rows))),
        "max_restarts": RESTARTS,
        "max_task_retries": RETRIES,
    }
    tasks: dict[str, Any] = {"num_cpus": resources.task_cpus, "max_retries": RETRIES}
    with warnings.catch_warnings():
        # Ray means to drop max_retries and the like, and has nothing else for them yet.
        warnings.filterwarnings("ignore", "`ray_remote_args`", DeprecationWarning)
        if resources.aligner_gpus:
            # 2. decode: a shard's videos -> their candidate frames, up to a few hundred MB.
            task = functools.partial(decode, config=config)
            work = work.map(task, **tasks)

            # 3. align: frames -> their landmarks, by actors that keep the network loaded.
            work = work.map(AlignActor, fn_constructor_args=(config,), **actors)  # type: ignore[arg-type]

            # 4. draw and pack: frames and landmarks -> samples -> the bytes of a tar.
            task = functools.partial(draw, config=config, spec=spec)
            work = work.map(task, **tasks)
        else:
            # 2. to 4. in one actor a core: nothing is won by sending frames from one to another.
            work = work.map(BuildActor, fn_constructor_args=(config, spec), **actors)  # type: ignore[arg-type]

    # 5. write: a tar and its manifest in the output folder.
    sink = ShardSink(config.output)
    work.write_datasink(sink, ray_remote_args=tasks)
    return sink


def to_row(work: Work) -> Row:
    """Pack a shard's work as one array of bytes, which has no limit of 2 GB in the object store."""
    return {"work": np.frombuffer(pickle.dumps(work, protocol=5), np.uint8)}


def to_work(row: Row) -> Work:
    """Unpack what another stage of this job packed."""
    return pickle.loads(row["work"])


class Attempt:
    """Runs a stage on one shard after another. An exception fails its shard, and the others go
    on."""

    def __init__(self, stage: Callable[[Work], Work]) -> None:
        self._stage = stage
        self._num_failures = 0

    def __call__(self, row: Row) -> Row:
        """Run the stage, unless the shard has failed before."""
        work = to_work(row)
        if work.failed:
            return row
        try:
            done = to_row(self._stage(work))
        except Exception as error:
            self._num_failures += 1
            if self._num_failures == FAILURES_IN_A_ROW:
                raise
            traceback.print_exc()  # Ray shows it to the driver
            why = f"{type(error).__name__}: {error}"
            return to_row(Work(shard=work.shard, cpu_s=work.cpu_s, failed=why))
        self._num_failures = 0
        return done


def decode(row: Row, config: BuildConfig) -> Row:
    """Decode a shard's videos, in a child process of this worker."""
    return Attempt(lambda work: stages.decode(work, config))(row)


class AlignActor(Attempt):
    """Holds a landmark backend."""

    def __init__(self, config: BuildConfig) -> None:
        super().__init__(Align(config))


def draw(row: Row, config: BuildConfig, spec: FaceSpec) -> Row:
    """Turn a shard's frames into samples, and those into a tar."""
    return Attempt(lambda work: stages.pack(stages.draw(work, config, spec), config.jpeg_quality))(
        row
    )


class BuildActor(Attempt):
    """Holds a landmark backend and a decoder, and does a shard's work, all but the writing."""

    def __init__(self, config: BuildConfig, spec: FaceSpec) -> None:
        super().__init__(Builder(config, spec))


class ShardSink(Datasink[list[Work]]):
    """Writes shards. Repeating a write is harmless: names and bytes depend on the work alone."""

    def __init__(self, folder: str) -> None:
        self.finished: list[Work] = []
        """In the driver, at the end: what each shard cost, and which have failed."""
        self._folder = folder

    def write(self, blocks: Iterable[Block], ctx: Any) -> list[Work]:
        """Write the shards of some blocks, in a worker."""
        rows = (row for block in blocks for row in BlockAccessor.for_block(block).iter_rows(True))
        return [stages.write(to_work(row), self._folder) for row in rows]

    def on_write_complete(self, write_result: Any) -> None:
        """Take in what the workers returned, in the driver."""
        self.finished = [work for works in write_result.write_returns for work in works]


def connect(config: BuildConfig) -> bool:
    """Join the cluster that the settings or `ray up` name, else start a Ray of our own.

    Returns whether it is our own, which no node is ever added to. Another Ray that happens to run
    here is somebody else's, and ends when they do.
    """
    for name in ("ray.data._internal", "ray.data.dataset"):
        logging.getLogger(name).setLevel(logging.ERROR)  # Watch and the summary say more
    if ray.is_initialized():
        return False
    on_head = Path(BOOTSTRAP).expanduser().exists()
    address = config.ray_address or ("auto" if on_head else "local")
    of_our_own: dict[str, Any] = {"num_cpus": config.num_cpus, "include_dashboard": False}
    try:
        knock(address)
        ray.init(
            address=address,
            logging_level=logging.ERROR,
            **(of_our_own if address == "local" else {}),
        )
    except (ConnectionError, TimeoutError, socket.gaierror):
        raise ValueError(
            f"No Ray cluster answers at {address}. Give --ray-address local."
        ) from None
    return address == "local"


def knock(address: str) -> None:
    """Raise an OSError soon where nobody answers at host:port, as Ray would try for minutes."""
    if place := re.fullmatch(r"([^/]+):(\d+)", address):
        socket.create_connection((place[1], int(place[2])), timeout=ANSWER_S).close()


def catch_signals() -> dict[signal.Signals, Any]:
    """Let signals end the job like Ctrl-C; returns what they did before.

    A cluster manager sends SIGTERM; a Ctrl-C that comes through ssh without a terminal is SIGHUP.
    """

    def interrupt(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    return {n: signal.signal(n, interrupt) for n in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)}


def build(config: BuildConfig, plan: Plan, console: Console) -> int:
    """See what there is to build with, and build in the output folder; returns the exit status."""
    is_our_own = connect(config)
    catch_signals()  # once more: Ray has put its own in their place
    cluster = ray.cluster_resources()
    resources = Resources.of(cluster, config)
    if is_our_own and resources.aligner_gpus > cluster.get("GPU", 0):
        raise ValueError(
            "--align.device cuda needs a GPU, and Ray sees none on this machine. Give "
            "--align.device auto or cpu, or --ray-address of a cluster with GPUs."
        )
    # The weights are on every node; the driver reads them for their sha256 alone.
    spec = face_spec(identify(config.align), config.crop)
    record = ledger.record_of(plan, config, spec, resources.device)
    with hold(config.output):
        return build_missing(config, plan, record, resources, console)


def build_missing(
    config: BuildConfig,
    plan: Plan,
    record: ledger.Record,
    resources: Resources,
    console: Console,
) -> int:
    """Build what is missing, then the index; returns the exit status."""
    ledger.claim(config.output, record)
    done = ledger.read_done(config.output, plan)
    shards = ledger.pending(plan, done, config.retry_rejects)
    ledger.reopen(config.output, shards)
    done = {name: done[name] for name in done.keys() - {shard.name for shard in shards}}
    if done:
        console.print(f"{len(done)} of {len(plan.shards)} shards are done already.")
    num_cpus = ray.cluster_resources().get("CPU", 1)
    started_s = time.monotonic()
    finished: Sequence[Work] = ()
    if shards:
        warn_of_slow_cpu(shards, config, resources, console)
        read_done = functools.partial(ledger.read_done, config.output, plan)
        with Watch(console, done, len(plan.shards), read_done):
            finished = run_graph(shards, config, record.face, resources).finished
        done = ledger.read_done(config.output, plan, done)
    wall_s = time.monotonic() - started_s

    missing = len(plan.shards) - len(done)
    if missing:
        for work in finished:
            if work.failed:
                console.print(f"{work.shard.name}: {work.failed}", soft_wrap=True)
        console.print(f"{missing} shards are not done. The same command tries them again.")
        return 1
    index = ledger.close(config.output, plan, done, record)
    write_report(config.output)
    cpu_s = sum((Counter(work.cpu_s) for work in finished), Counter())
    num_videos = sum(len(work.shard.videos) for work in finished)
    num_held_out = plan.describe()["held-out videos"]
    console.print(summary(index, num_held_out, cpu_s, num_videos, wall_s, num_cpus))
    return conclude(config, index, console)


def warn_of_slow_cpu(
    shards: Sequence[Shard], config: BuildConfig, resources: Resources, console: Console
) -> None:
    """Say what it will cost to run the fan backend without a GPU, if that is what will happen."""
    if config.align.backend != "fan" or resources.device != "cpu":
        return
    frames = sum(config.num_frames(v.split) for s in shards for v in s.videos)
    hours = frames * FAN_CPU_S / resources.num_aligners / 3600
    console.print(
        f"[yellow]warning:[/] Ray sees no GPU, so fan runs on CPUs: about {hours:,.1f} h for "
        f"{frames:,.0f} frames. --align.backend dlib takes milliseconds a frame.",
        soft_wrap=True,
    )


def conclude(config: BuildConfig, index: Index, console: Console) -> int:
    """Print what was written; the exit status says whether too much was rejected."""
    for name in (INDEX, REJECTS, REPORT):
        print(join(config.output, name))
    rate = index.totals["rejected"] / index.totals["planned"]
    if rate <= config.max_reject_rate:
        return 0
    console.print(
        f"{rate:.0%} of the videos were rejected, more than max_reject_rate "
        f"({config.max_reject_rate:.0%}): see rejects.jsonl. The shards are whole; if the rejects "
        "are right, raise --max-reject-rate; --retry-rejects tries their shards again.",
        soft_wrap=True,
    )
    return 1


def verify(config: BuildConfig, console: Console) -> int:
    """Compare all that was written with its index."""
    problems = ledger.verify(config.output)
    for problem in problems:
        console.print(problem, soft_wrap=True)
    if problems:
        console.print("Delete the files named, and run the build again without --verify.")
        return 1
    console.print(f"{config.output} is as its index says.")
    return 0


def root_of(error: BaseException) -> BaseException:
    """Find what a worker raised, inside the layers that Ray has put around it."""
    while isinstance(error, RayError):
        cause = getattr(error, "cause", None) or error.__cause__
        if not isinstance(cause, BaseException) or isinstance(cause, SystemException):
            break
        error = cause
    return error


def explain(error: BaseException) -> str:
    """Say in a line what ended the job."""
    root = root_of(error)
    said, _, _ = str(root).strip().partition("\nFailed to apply UDF")  # which Ray adds to it
    if not isinstance(root, RayError):
        return said or type(root).__name__
    if told := TOLD.findall(str(error)):
        return told[-1]
    first = said.splitlines()[0] if said else type(root).__name__
    if isinstance(root, (RayActorError, WorkerCrashedError, OutOfMemoryError)):
        return (
            f"The worker of a shard died, {1 + RETRIES} times in a row: {first} "
            "What is finished stays, and the same command tries the rest again. Should it die "
            "again, Ray's messages above say more."
        )
    return first


def main(argv: Sequence[str] | None = None) -> int:
    """Read the flags and build; returns the exit status."""
    config = tyro.cli(
        BuildConfig, args=argv, description=__doc__, config=(tyro.conf.FlagCreatePairsOff,)
    )
    # Workers have working folders of their own.
    config = dataclasses.replace(
        config, input=absolute(config.input), output=absolute(config.output)
    )
    console = Console(stderr=True)
    previous = catch_signals()
    try:
        if config.verify:
            return verify(config, console)
        plan = make_plan(find_videos(config.input), config)
        told = Console(soft_wrap=True) if config.dry_run else console
        told.print_json(json.dumps(dataclasses.asdict(config)))
        told.print(", ".join(f"{n:,} {what}" for what, n in plan.describe().items()))
        return 0 if config.dry_run else build(config, plan, console)
    except KeyboardInterrupt:
        console.print("Stopped. What is finished stays; the same command goes on from there.")
        return 130
    except (ValueError, RuntimeError, OSError, RayError) as error:
        said = escape(explain(error))
        console.print(f"[red]error:[/] {said}", soft_wrap=True, highlight=False)
        return 1
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    sys.exit(main())
