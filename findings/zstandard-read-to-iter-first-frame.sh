#!/usr/bin/env bash
# Of the ways in which the zstandard package reads a file of two frames, some give both and some the first, in silence.
#
# Versions:  zstandard 0.25.0, 2026-11-29
# Guess:     files of several frames are common (pzstd, or `cat a.zst b.zst`), and every streaming way of one
#            decompressor treats them alike: all read on, or all stop at the frame's end as the documentation of
#            read_across_frames=False says.
# Behaviour: zstandard.open, stream_reader in a loop and copy_stream give the lines of both frames; read_to_iter and
#            decompress give those of the first. No way raises. One stream_reader.read(1 << 20) gives the first frame
#            too, though more follows at the next call.
# Seen:      open 4, stream_reader loop 4, copy_stream 4, read_to_iter 2, decompress 2 (of 4 lines)
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT; cd "$work"
python3 -m venv env
env/bin/pip install --quiet zstandard==0.25.0
env/bin/python - <<'PY' | tee seen
import io

import zstandard

frame = zstandard.ZstdCompressor().compress
with open("two.zst", "wb") as file:
    file.write(frame(b"one\ntwo\n") + frame(b"three\nfour\n"))


def source():
    return open("two.zst", "rb")


def looped():
    reader = zstandard.ZstdDecompressor().stream_reader(source())
    return b"".join(iter(lambda: reader.read(1 << 16), b""))


def copied():
    target = io.BytesIO()
    zstandard.ZstdDecompressor().copy_stream(source(), target)
    return target.getvalue()


ways = {
    "open": zstandard.open("two.zst", "rb").read(),
    "stream_reader loop": looped(),
    "copy_stream": copied(),
    "read_to_iter": b"".join(zstandard.ZstdDecompressor().read_to_iter(source())),
    "decompress": zstandard.ZstdDecompressor().decompress(source().read()),
}
for name, data in ways.items():
    print(name, data.count(b"\n"))
PY
diff seen - <<'EXPECTED'
open 4
stream_reader loop 4
copy_stream 4
read_to_iter 2
decompress 2
EXPECTED
echo "as described"
