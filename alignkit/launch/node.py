"""`python -m alignkit.launch.node --num_gpus N --master_port P --module MODULE ARGUMENT…`: the ranks of this machine.

Tells DeepSpeed's launcher of one node which devices there are and becomes it. DeepSpeed's runner in front of it is for
several nodes: it imports torch once more, leaves the ranks behind when it is killed, and given a number of ranks it puts
0, 1, … in the place of CUDA_VISIBLE_DEVICES.

A rank is a child of this process and ends with it (`alignkit.worker` asks the kernel for that).
"""

from __future__ import annotations

import base64
import json
import os
import runpy
import sys

PARENT = "ALIGNKIT_LAUNCHER"  # in a rank's environment: the process that it must not outlive


def devices(visible: str | None, ranks: int) -> list[str]:
    """What each rank computes on, as CUDA_VISIBLE_DEVICES names it: numbers, UUIDs or MIG ids, in their order.

    More ranks than devices is right without a GPU alone (`Local.check` refuses the rest): the last one is named
    again. "" stands for no device, which in a list is -1.
    """
    if visible is None:
        return [str(index) for index in range(ranks)]
    named = [name.strip() for name in visible.split(",") if name.strip()] or ["-1"]
    return (named + named[-1:] * ranks)[:ranks]


def main() -> None:
    """Read the options, which stand in this order, and become DeepSpeed's launcher."""
    at = sys.argv.index("--module")
    options = dict(zip(sys.argv[1:at:2], sys.argv[2:at:2], strict=True))
    here = {"localhost": devices(os.environ.get("CUDA_VISIBLE_DEVICES"), int(options["--num_gpus"]))}
    world = base64.urlsafe_b64encode(json.dumps(here).encode()).decode()
    os.environ[PARENT] = str(os.getpid())
    port = ("--master_addr", "127.0.0.1", "--master_port", options["--master_port"])
    sys.argv = ["launch", "--world_info", world, *port, "--no_local_rank", *sys.argv[at:]]
    runpy.run_module("deepspeed.launcher.launch", run_name="__main__")


if __name__ == "__main__":
    main()
