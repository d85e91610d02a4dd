"""`dus upscale --stream` on a line without a limit, against curl and huggingface_hub's own download.

    python tests/benchmarks/fast_line.py --work DIR [--layers 16] [--rounds 3] [--jobs 4,64]

The Hub is the tests' stand-in on loopback; nginx (Debian: `apt-get install nginx-light`) serves the
blobs, with sendfile and from the page cache. `curl` writes the base's files, one process with four
transfers at once. `snapshot_download` is huggingface_hub's, of the base alone, with
HF_HUB_DISABLE_XET=1. Peers take turns. CPU seconds are those of the process, start-up counted, as
is all of its time. `MB/CPU s` counts the bytes that the process wrote. Prints Markdown.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.request import urlopen

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from checkpoints import write_mistral
from hub_server import StandInHub, StandInRepo, commit_of
from upscale import Run, ratio, say, spawn, table, values

_NGINX = """
daemon off; worker_processes 1; pid {home}/pid; error_log {home}/error.log;
events {{ worker_connections 512; }}
http {{
  access_log off; sendfile on; tcp_nopush on; default_type application/octet-stream;
  client_body_temp_path {home}/body; proxy_temp_path {home}/proxy; fastcgi_temp_path {home}/fastcgi;
  uwsgi_temp_path {home}/uwsgi; scgi_temp_path {home}/scgi;
  server {{ listen 127.0.0.1:{port}; location /cdn/{repo}/ {{ alias {folder}/; }} }}
}}
"""

_SNAPSHOT = (
    "import sys; from huggingface_hub import snapshot_download; snapshot_download(sys.argv[1])"
)


@contextlib.contextmanager
def nginx(home: Path, repo: str, folder: Path) -> Iterator[str]:
    """nginx, serving a folder as a repo at a commit; its origin."""
    if shutil.which("nginx") is None:
        sys.exit("nginx is not installed: apt-get install nginx-light")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    home.mkdir(parents=True, exist_ok=True)
    home.chmod(0o755)
    text = _NGINX.format(home=home, port=port, repo=repo, folder=folder)
    if os.getuid() == 0:
        text = f"user root;{text}"
    (home / "nginx.conf").write_text(text)
    server = subprocess.Popen(["nginx", "-p", str(home), "-c", str(home / "nginx.conf")])
    try:
        for _ in range(100):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                break
            time.sleep(0.05)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait()


def measured(work: Path, command: list[str]) -> tuple[Run, int]:
    """A run with an empty cache and an empty output, and the bytes of weights that it left."""
    for folder in (work / "out", work / "hf"):
        shutil.rmtree(folder, ignore_errors=True)
    (work / "out").mkdir()
    os.sync()
    run = spawn(command)
    files = [*(work / "out").rglob("*.safetensors"), *(work / "hf").rglob("*.safetensors")]
    return run, sum(path.stat().st_size for path in files if path.is_file())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--jobs", default="4,64")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    work: Path = options.work.resolve()
    name = f"mistral-{options.layers}x{options.hidden}"
    folder, commit = work / name, commit_of(name)
    if not folder.exists():
        write_mistral(folder, options.layers, options.hidden)
    repo = StandInRepo({commit: folder}, {"main": commit})
    with (
        nginx(work / "nginx", f"org/{name}/{commit}", folder) as origin,
        StandInHub({f"org/{name}": repo}, cdn=origin) as hub,
    ):
        os.environ |= {
            "HF_HOME": str(work / "hf"),
            "HF_ENDPOINT": hub.endpoint,
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_XET": "1",
        }
        dus = [sys.executable, "-m", "dus_cli", "upscale", f"org/{name}", "--json"]
        dus += ["-o", str(work / "out" / "deep"), "--stream"]
        shards = [path.name for path in folder.glob("*.safetensors")]
        urls = [f"{origin}/cdn/org/{name}/{commit}/{shard}" for shard in shards]
        targets = [word for shard in shards for word in ("-o", str(work / "out" / shard))]
        peers = {
            f"--stream --jobs {jobs}": [*dus, "--jobs", jobs] for jobs in options.jobs.split(",")
        }
        peers["curl"] = ["curl", "-sS", "--no-progress-meter", "-Z", "--parallel-max", "4"]
        peers["curl"] += [*targets, *urls]
        peers["snapshot_download"] = [sys.executable, "-c", _SNAPSHOT, f"org/{name}"]
        files = f"{hub.endpoint}/api/models/org/{name}/tree/{commit}?recursive=true"
        urlopen(files, timeout=3600).read()  # noqa: S310  (the stand-in hashes its files once)
        runs: dict[str, list[tuple[Run, int]]] = {peer: [] for peer in peers}
        names = list(peers)
        for number in range(options.rounds):
            for peer in names[number % len(names) :] + names[: number % len(names)]:
                runs[peer].append(measured(work, peers[peer]))
                run = runs[peer][-1][0]
                say(f"round {number + 1}, {peer}: {run.seconds:.1f} s, {run.cpu:.1f} CPU s")
    report(runs, names)
    for left in ("out", "hf", "nginx"):
        shutil.rmtree(work / left, ignore_errors=True)


def report(runs: dict[str, list[tuple[Run, int]]], names: list[str]) -> None:
    rows = []
    speeds = {peer: [size / 1e6 / run.cpu for run, size in done] for peer, done in runs.items()}
    times = {peer: [run.seconds for run, _ in done] for peer, done in runs.items()}
    for peer, done in runs.items():
        rows.append(
            [
                peer,
                f"{done[0][1] / 1e9:.2f}",
                values(times[peer], 1),
                values([run.cpu for run, _ in done], 1),
                values(speeds[peer], 0),
                values([run.peak / 1e6 for run, _ in done], 0),
            ]
        )
    heads = ["", "written, GB", "s", "CPU s", "MB/CPU s", "peak RSS, MB"]
    table("On a line without a limit", heads, rows)
    print()
    for peer in names[:-2]:
        ratio(f"{peer} / curl, bytes per CPU second", speeds[peer], speeds["curl"])
        ratio(f"{peer} / snapshot_download, time", times[peer], times["snapshot_download"])
        fetched = json.loads(runs[peer][0][0].stdout)["streamed"]
        print(f"- {peer}: {len(fetched['checked'])} files held against the Hub's sha256")


if __name__ == "__main__":
    main()
