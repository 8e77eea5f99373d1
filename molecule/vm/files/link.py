"""A device's network as it is from within, by datagrams to somebody who sends them back.

python link.py echo          answers, until nothing has come for two minutes
python link.py measure PEER  prints what was found, as JSON: see `measure`
"""

import json
import socket
import statistics
import sys
import time

PORT = 7000
PINGS, BURST, BYTES = 24, 250, 1200
HEADERS = 42
"""Ethernet, IP and UDP, which a rate counts, too."""
PATIENCE = 2.0


def echo() -> None:
    """Send back what comes."""
    with socket.socket(type=socket.SOCK_DGRAM) as server:
        server.bind(("", PORT))
        server.settimeout(120)
        while True:
            data, sender = server.recvfrom(2 * BYTES)
            server.sendto(data, sender)


def ping(link: socket.socket, number: int) -> float | None:
    """Seconds until one datagram is back; None where it is lost."""
    data = str(number).encode()
    sent = time.monotonic()
    link.send(data)
    try:
        while link.recv(2 * BYTES) != data:
            pass
    except TimeoutError:
        return None
    return time.monotonic() - sent


def burst(link: socket.socket) -> list[float]:
    """When each of many datagrams that were sent at once came back."""
    for _ in range(BURST):
        link.send(bytes(BYTES))
    times = []
    try:
        while True:
            link.recv(2 * BYTES)
            times.append(time.monotonic())
    except TimeoutError:
        return times


def measure(peer: str) -> dict[str, float]:
    """What the link to a peer is like.

    Returns:
        `trip`: seconds there and back, the median; `spread`: between its quartiles; `returned`:
        share of what was sent; `rate`: bits a second, at which it came back.
    """
    with socket.socket(type=socket.SOCK_DGRAM) as link:
        link.connect((peer, PORT))
        link.settimeout(PATIENCE)
        trips = [trip for number in range(PINGS) if (trip := ping(link, number)) is not None]
        times = burst(link)
    low, middle, high = statistics.quantiles(trips, n=4)
    bits = (len(times) - 1) * (BYTES + HEADERS) * 8
    return {
        "trip": middle,
        "spread": high - low,
        "returned": len(times) / BURST,
        "rate": bits / (times[-1] - times[0]),
    }


if __name__ == "__main__":
    if sys.argv[1] == "echo":
        echo()
    else:
        print(json.dumps(measure(sys.argv[2])))
