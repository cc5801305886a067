"""Plan 1.1 million segments, as many as VoxCeleb2 has: time and memory.

    python tests/bench/plan.py [NUM_PERSONS]

Prints what was planned, in how long and with how much memory.
"""

import os
import resource
import sys
import time
from collections.abc import Iterator

from pipeline.config import BuildConfig
from pipeline.plan import make_plan

LIMIT_S = 60
LIMIT_MB = 2000


def listing(num_persons: int) -> Iterator[str]:
    """Make up VoxCeleb2's tree: 24 videos a person, 7 or 8 segments a video."""
    for person in range(num_persons):
        for video in range(24):
            for segment in range(7 + (person + video) % 2):
                yield f"dev/mp4/id{person:05}/_{video:02}uxsk56VD{person % 97:02}/{segment:05}.mp4"


def main() -> int:
    """Plan, and compare with the limits."""
    num_persons = int(sys.argv[1]) if len(sys.argv) > 1 else 6112
    paths = list(listing(num_persons))
    start_s = time.perf_counter()
    plan = make_plan(paths, BuildConfig())
    planned_s = time.perf_counter() - start_s
    digest = plan.sha256
    total_s = time.perf_counter() - start_s
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"{os.cpu_count()} cores; {len(paths):,} files -> {plan.describe()}")
    print(f"plan     {planned_s:6.1f} s")
    print(f"sha256   {total_s - planned_s:6.1f} s  {digest[:12]}")
    print(f"total    {total_s:6.1f} s   (limit {LIMIT_S} s)")
    print(f"memory   {peak_mb:6.0f} MB  (limit {LIMIT_MB} MB, the listing included)")
    return 0 if total_s < LIMIT_S and peak_mb < LIMIT_MB else 1


if __name__ == "__main__":
    sys.exit(main())
