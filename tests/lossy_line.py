"""A slow and lossy line between two network namespaces, for kernels without netem: a TUN device in
each, and this process in between, which delays every packet and drops some.

`python lossy_line.py NAMESPACE ADDRESS/BITS NAMESPACE ADDRESS/BITS DELAY LOSS`: DELAY in seconds
one way, LOSS a share of the packets. It says "ready" once both devices are up, and at SIGTERM how
many packets it passed on and dropped.
"""

from __future__ import annotations

import ctypes
import fcntl
import heapq
import itertools
import os
import random
import select
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

# linux/if_tun.h, sched.h
TUNSETIFF, IFF_TUN, IFF_NO_PI, CLONE_NEWNET = 0x400454CA, 1, 0x1000, 0x40000000


def enter(namespace: Path) -> None:
    file = os.open(namespace, os.O_RDONLY)
    if ctypes.CDLL(None, use_errno=True).setns(file, CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(namespace))
    os.close(file)


def device(namespace: str, address: str) -> int:
    """A TUN device in a namespace, up and with an address; its file descriptor, which stays with
    it.
    """
    enter(Path("/run/netns") / namespace)
    file = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(file, TUNSETIFF, struct.pack("16sH", b"line", IFF_TUN | IFF_NO_PI))
    for words in (f"addr add {address} dev line", "link set line up", "link set lo up"):
        subprocess.run(["ip", *words.split()], check=True, capture_output=True)
    return file


def relay(ends: tuple[int, int], delay: float, loss: float) -> None:
    chance, numbers = random.Random(0), itertools.count()
    passed = dropped = 0

    def end(*_: object) -> None:
        print(passed, dropped, flush=True)
        sys.exit()

    signal.signal(signal.SIGTERM, end)
    due: list[tuple[float, int, int, bytes]] = []
    while True:
        wait = max(0.0, due[0][0] - time.monotonic()) if due else None
        for file in select.select(ends, [], [], wait)[0]:
            packet = os.read(file, 65536)
            if chance.random() < loss:
                dropped += 1
            else:
                passed += 1
                other = ends[0] if file == ends[1] else ends[1]
                heapq.heappush(due, (time.monotonic() + delay, next(numbers), other, packet))
        while due and due[0][0] <= time.monotonic():
            *_, other, packet = heapq.heappop(due)
            os.write(other, packet)


if __name__ == "__main__":
    one, its_address, two, another, seconds, share = sys.argv[1:]
    both = device(one, its_address), device(two, another)
    print("ready", flush=True)
    relay(both, float(seconds), float(share))
