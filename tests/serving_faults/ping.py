"""``python ping.py PORT``: asks /health/live all the time until stdin closes, and prints the longest waits (ms)."""

import select
import socket
import sys
import time

ASK = b"GET /health/live HTTP/1.1\r\nHost: localhost\r\n\r\n"
PAUSE_S = 0.02


def main(port: int) -> None:
    waits, lost, own = [0.0], 0, 0.0
    connection = None
    while not select.select([sys.stdin], [], [], 0)[0]:
        began = time.monotonic()
        try:
            if connection is None:
                connection = socket.create_connection(("127.0.0.1", port), timeout=30)
            connection.sendall(ASK)
            got = b""
            while not got.endswith(b'"ok"}'):
                part = connection.recv(4096)
                got += part
                if not part or not got.startswith(b"HTTP/1.1 200"):
                    raise OSError
            waits.append(time.monotonic() - began)
        except OSError:
            lost, connection = lost + 1, None
        slept = time.monotonic()
        time.sleep(PAUSE_S)
        own = max(own, time.monotonic() - slept - PAUSE_S)
    waits.sort()
    print(1000 * waits[-1], 1000 * waits[int(0.99 * len(waits))], len(waits), lost, 1000 * own)


if __name__ == "__main__":
    main(int(sys.argv[1]))
