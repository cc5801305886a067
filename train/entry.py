"""What the entries share: failures in one line for people, and outputs that harm no input."""

import os
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline.storage import StorageError
from train.step import NonFiniteError
from train.world import own_rank

GRACE_S = 2.0
"""What stops all processes is said by the main one: torchrun ends the others in this time. What
stops one alone is said by that one."""


@contextmanager
def said_plainly(entry: str) -> Iterator[None]:
    """End the program with one line instead of a traceback: status 1, or 130 after Ctrl-C.

    What torch raises of its own, and any mistake of ours, keeps its traceback.
    """
    try:
        yield
    except KeyboardInterrupt:
        if own_rank() == 0:
            print(f"{entry}: stopped", file=sys.stderr, flush=True)
        sys.exit(130)
    except (ValueError, OSError, StorageError, NonFiniteError) as error:
        who = entry
        if rank := own_rank():
            time.sleep(GRACE_S)
            who = f"{entry} (rank {rank})"
        sys.exit(f"{who}: {error}")


def claim_output(output: Path, inputs: Iterable[Path]) -> None:
    """Raise where a file can't be written, or would take the place of one that is read.

    Makes the output's folder. Before the work, not after it, is when to hear of this.
    """
    if output.is_dir():
        raise ValueError(f"the output {output} is a folder: give the name of a file")
    for path in inputs:
        if output.resolve() == path.resolve() or (
            output.exists() and path.exists() and output.samefile(path)
        ):
            raise ValueError(f"the output {output} would replace an input: give it another name")
        if path.is_dir() and output.resolve().parent == path.resolve():
            raise ValueError(
                f"the output {output} lies in the folder {path}, all of which is read: give it "
                "another place"
            )
    output.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(output.parent, os.W_OK):
        raise ValueError(f"the folder {output.parent} can't be written to: give another output")
