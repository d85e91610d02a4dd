"""`dus` for a script: `python asking.py SOCKET ARGUMENTS` has a server (child.py) fork the command with
the arguments, folder, environment and files of this process, and ends with its code.
"""

import json
import os
import socket
import sys
from pathlib import Path

if __name__ == "__main__":
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(sys.argv[1])
        request = json.dumps([sys.argv[2:], str(Path.cwd()), dict(os.environ)]).encode()
        sent = socket.send_fds(connection, [request], [0, 1, 2])
        connection.sendall(request[sent:])
        connection.shutdown(socket.SHUT_WR)
        sys.exit(int(connection.recv(16)))
