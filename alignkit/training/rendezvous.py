"""Where the ranks meet: torch's store on a socket of ours, which no other machine reaches that has no part in the run.

torch opens its store on every interface, without a key: who can connect may set what the ranks read, and so stop or
mislead them. Here rank 0 listens on the loopback where all ranks are of one machine, else on the address that
MASTER_ADDR names.
"""

from __future__ import annotations

import datetime
import errno
import os
import socket
import time
from collections.abc import Callable
from typing import Any

from alignkit.core.errors import RunError

WITHIN = datetime.timedelta(minutes=15)  # all ranks have come by then; a container may be unpacked before


def join(backend: str, device: Any = None, note: Callable[[str], None] = print) -> None:
    """Join the process group that RANK, WORLD_SIZE, LOCAL_SIZE, MASTER_ADDR and MASTER_PORT describe.

    Args:
        device: of this rank, where the backend is to know it.
        note: tells the person who waits.

    Raises:
        RunError: the port is taken, or not all ranks came.
    """
    import torch.distributed as dist

    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if int(os.environ.get("LOCAL_SIZE", 0)) == size:
        os.environ["MASTER_ADDR"] = "127.0.0.1"
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    given: dict[str, Any] = {"master_listen_fd": listen(host, port, note)} if rank == 0 else {}
    try:
        store = dist.TCPStore(host, port, size, rank == 0, WITHIN, **given)
    except dist.DistError as error:
        raise RunError(
            f"rank {rank} waited {WITHIN.seconds // 60} min for all {size} ranks at {host}:{port} ({error}): the log of a rank that "
            "did not come says why"
        ) from None
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, device_id=device if size > 1 else None)


def listen(host: str, port: int, note: Callable[[str], None] = print, patience: float = 30.0) -> int:
    """The descriptor of a socket that listens on one address: what `host` names on this machine.

    A name that the machine gives itself on its loopback alone is no address that others reach: then on every interface.
    A port that is taken is waited for, as the one of a run that has just ended.

    Raises:
        RunError: the port stays taken.
    """
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    if str(address[0]).startswith("127.") and host != "127.0.0.1":
        address = ("", port)
    end, told = time.monotonic() + patience, False
    while True:
        server = socket.socket(family, socket.SOCK_STREAM)
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            server.bind(address)
            server.listen(1024)
            return server.detach()
        except OSError as error:
            server.close()
            if time.monotonic() > end:
                raise RunError(
                    f"the ranks cannot meet at {host}:{port}: {errno.errorcode.get(error.errno or 0)} ({error.strerror}): another "
                    "program has that port; leave launcher.port out for a free one, or give another"
                ) from None
            if not told:
                note(f"{host}:{port} is taken by another program: waits up to {patience:.0f} s for it")
                told = True
            time.sleep(0.5)


def own_device(local_rank: int, visible: int) -> int:
    """The device of a rank: of all that its node has, or the only one that Slurm lets it see (--gpus-per-task, --gpu-bind).

    Raises:
        RunError: it sees several, and not enough of them.
    """
    if local_rank < visible or visible == 1:
        return min(local_rank, visible - 1)
    raise RunError(
        f"rank {local_rank} of this machine sees {visible} GPUs: expected one a rank; lower launcher.num_ranks, or ask for more "
        "with launcher.gpus_per_node"
    )
