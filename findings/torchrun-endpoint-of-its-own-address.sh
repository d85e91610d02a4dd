#!/usr/bin/env bash
# torchrun does not serve a rendezvous at an address of its own interface, if its host name resolves to another one.
#
# Versions:  torch 2.13.0, 2026-11-30 (Linux; needs unprivileged user namespaces or root, and iproute2)
# Guess:     a node that is given an address of its own as --rdzv-endpoint finds this out from its interfaces, and serves
#            the rendezvous; how /etc/hosts spells the host name does not matter.
# Behaviour: the address is compared with those that the host name resolves to. Where that is 127.0.1.1, as Debian's
#            installer writes it, no node of the run takes itself for the host, and all of them end with
#            RendezvousConnectionError. With is_host=true in --rdzv-conf on one node it works.
# Seen:      see EXPECTED below
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT; cd "$work"
python3 -m venv env
env/bin/pip install --quiet torch==2.13.0 numpy
echo 'print("the worker runs", flush=True)' > worker.py
cat > node.sh <<'NODE'
ip link set lo up
ip addr add 10.77.0.1/32 dev lo
python3 -c 'import socket; socket.sethostname("node-0")'
run() {
    printf '127.0.0.1 localhost\n%s node-0\n' "$1" > hosts
    mount --bind hosts /etc/hosts
    printf '%s, %s: ' "$1" "$2"
    env/bin/torchrun --nnodes=1 --nproc-per-node=1 --rdzv-backend=c10d --rdzv-endpoint=10.77.0.1:29500 \
        --local-addr=10.77.0.1 --rdzv-conf="read_timeout=10$2" worker.py > out 2> err || true
    cat out; grep -o 'api.RendezvousConnectionError' err || true
}
run 10.77.0.1 ''
run 127.0.1.1 ''
run 127.0.1.1 ',is_host=true'
NODE
unshare --user --map-root-user --net --uts --mount bash node.sh | tee seen
diff seen - <<'EXPECTED'
10.77.0.1, : the worker runs
127.0.1.1, : api.RendezvousConnectionError
127.0.1.1, ,is_host=true: the worker runs
EXPECTED
echo "as described"
