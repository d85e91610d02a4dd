"""Bases in pytorch_model*.bin: real torch.save files through the real command, and files that
mean harm.
"""

from __future__ import annotations

import builtins
import io
import json
import os
import pickle
import random
import runpy
import shutil
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from checkpoints import fill_randomly, llama_config, llama_tensors, write_checkpoint
from conftest import dus as started_dus
from damage import mutate, one_line_problem
from forked import dus_with_torch as dus
from pickled import INDEX, Payload, random_tensors, save_pickled, write_pickled
from safetensors import safe_open
from safetensors.torch import save_file
from written import names_and_bytes, problems

from dus_cli.common.reference import ModelRef
from dus_cli.planning.plan import Base, MapRequest, make_plan
from dus_cli.source import strided
from dus_cli.source.checkpoint import open_checkpoint
from dus_cli.source.headers import DTYPE_BITS, TensorInfo
from dus_cli.source.pickles import read_pickled
from dus_cli.source.strided import tensor_pieces

NAME = "pytorch_model.bin"
UP = "model.layers.{}.mlp.up_proj.weight"  # (128, 64) in `state`


@pytest.fixture
def state() -> dict[str, torch.Tensor]:
    """Four Llama layers of random bf16, no two tensors alike."""
    return random_tensors(llama_tensors(4))


def refuse(folder: Path, *parts: str) -> None:
    """`dus upscale` ends in one line that holds all parts, and leaves nothing."""
    out = folder.parent / "out"
    dus("upscale", folder, "--trim", "1", "-o", out, "-q").assert_one_line_error(*parts)
    assert not out.exists()


def refuse_saved(folder: Path, content: object, *parts: str, **options: Any) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(llama_config(4)))
    torch.save(content, folder / NAME, **options)
    refuse(folder, *parts)


def refuse_file(path: Path, *parts: str) -> None:
    """The reader ends in one line that holds all parts: as `refuse`, without starting Python and
    torch each time.
    """
    problem = one_line_problem(lambda: read_pickled(path, path.name))
    assert problem is not None, parts
    assert all(part in problem for part in (path.name, *parts)), problem


def rows_of(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a directory of safetensors."""
    tensors: dict[str, torch.Tensor] = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return tensors


def assert_output_is_that_of_safetensors(
    folder: Path, state: dict[str, torch.Tensor], *, as_zip: bool = True
) -> None:
    """The pickled state gives what the same tensors give when safetensors holds them row by row."""
    config = llama_config(4)
    root = folder.parent
    save_pickled(folder, state, config, as_zip=as_zip)
    twin = root / "twin"
    twin.mkdir()
    (twin / "config.json").write_text(json.dumps(config))
    save_file({name: tensor.detach().clone(memory_format=torch.contiguous_format) for name, tensor in state.items()},
              twin / "model.safetensors")  # fmt: skip
    for base in (folder, twin):
        report = dus(
            "upscale",
            base,
            "--trim",
            "1",
            "-o",
            root / f"{base.name}-out",
            "--verify",
            "full",
            "--json",
        ).report
        assert report["base_format"] == ("pickle" if base is folder else "safetensors")
    ours, theirs = rows_of(root / f"{folder.name}-out"), rows_of(root / "twin-out")
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype
        assert tensor.shape == theirs[name].shape
        assert (
            tensor.view(torch.uint8).equal(theirs[name].view(torch.uint8))
            if tensor.ndim
            else tensor == theirs[name]
        )
    assert (
        dus("verify", root / f"{folder.name}-out", "--base", folder, "--json").report[
            "bytes_compared"
        ]
        > 0
    )


# --- what is read -------------------------------------------------------------------------------


@pytest.mark.parametrize("as_zip", [True, False])
def test_pickled_base_gives_what_safetensors_give(
    as_zip: bool, state: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    assert_output_is_that_of_safetensors(tmp_path / "base", state, as_zip=as_zip)


def test_shards_are_read_as_the_index_says(state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    config = llama_config(4)
    save_pickled(tmp_path / "one", state, config)
    save_pickled(tmp_path / "three", state, config, num_shards=3)
    for name in ("one", "three"):
        dus("upscale", tmp_path / name, "--trim", "1", "-o", tmp_path / f"{name}-out", "-q")
    one, three = rows_of(tmp_path / "one-out"), rows_of(tmp_path / "three-out")
    assert all(tensor.equal(three[name]) for name, tensor in one.items())
    assert one.keys() == three.keys()


@pytest.mark.parametrize("as_zip", [True, False])
def test_views_and_every_order_of_elements_are_written_row_by_row(
    as_zip: bool, state: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    whole = torch.randn(512, 64).bfloat16()
    pair = torch.randn(24)
    state |= {
        "model.layers.1.c": pair[:12].view(3, 4).t(),  # 12 elements, and the next begins 12 further
        "model.layers.1.d": pair[12:],
        UP.format(0): state[UP.format(0)].t().contiguous().t(),  # transposed
        UP.format(1): whole[100:228],  # part of a storage
        UP.format(2): whole[::4],  # strided, and shared with the one above
        UP.format(3): torch.randn(64).bfloat16().expand(128, 64),  # stride 0
        "model.layers.0.a": torch.randn(3, 5, 7).permute(2, 0, 1),
        "model.layers.1.a": torch.randn(7, 3, 5).double()[:, 1:, ::2],
        "model.layers.2.a": torch.arange(35).view(5, 7).t() % 2 == 0,
        "model.layers.3.a": torch.randn(4, 6).to(torch.float8_e4m3fn).t(),
        "model.layers.0.b": torch.tensor(3.5),
        "model.layers.1.b": torch.zeros(0, 3),
        "model.layers.2.b": torch.arange(12).to(torch.uint16).view(3, 4),
        "model.layers.3.b": torch.nn.Parameter(torch.randn(3, 1, 4).transpose(0, 1)),
    }
    assert_output_is_that_of_safetensors(tmp_path / "base", state, as_zip=as_zip)


def test_what_can_be_cloned_leaves_out_views_and_is_not_joined_across_them(
    state: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    whole = torch.randn(40_000)
    state |= {
        "model.layers.0.a": whole[:20_000],
        "model.layers.0.b": whole[::2],
        "model.layers.0.c": whole[20_000:],
    }
    folder = save_pickled(tmp_path / "base", state, llama_config(4))
    plan = make_plan(
        Base(ModelRef(str(folder), path=folder)), open_checkpoint(folder), MapRequest(layers="0:4")
    )
    (layout,) = plan.shards.values()
    segments, places = list(layout.segments()), list(layout.positions())
    assert [
        placement.name[-1] for placement, _ in places if placement.name[-2:] in {".a", ".b", ".c"}
    ] == [
        "a",
        "b",
        "c",
    ]
    for placement, start in places:
        inside = [s for s in segments if s.start <= start < s.start + s.length]
        if placement.tensor.strides is None:
            (segment,) = inside
            assert segment.source_start + start - segment.start == placement.tensor.start
        else:
            assert not inside


def test_tensors_far_longer_than_a_piece_are_gathered(
    state: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    wide = torch.randn(3000, 5000)  # 60 MB: pieces of 4 MiB, each from windows all over the storage
    state |= {
        UP.format(k): wide.t() if k == 1 else torch.randn(1).expand(5000, 3000) for k in range(4)
    }
    assert_output_is_that_of_safetensors(tmp_path / "base", state)


def test_gathering_agrees_with_torch_for_random_views(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(strided, "PIECE", 64)  # so that small tensors are cut every which way
    rng, path = random.Random(4), tmp_path / "x"
    path.write_bytes(os.urandom(100_000))
    raw = torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8)
    file = os.open(path, os.O_RDONLY)
    for _ in range(500):
        dtype, view = rng.choice(
            [("U8", torch.uint8), ("BF16", torch.int16), ("F32", torch.int32), ("F64", torch.int64)]
        )
        shape = tuple(rng.randrange(1, 9) for _ in range(rng.randrange(1, 5)))
        strides = tuple(rng.choice([0, 1, 2, 3, 7, 40, 200]) for _ in shape)
        start = 8 * rng.randrange(100)
        rows = torch.empty(shape, dtype=view).copy_(
            raw[start:].view(view).as_strided(shape, strides)
        )
        expected = rows.view(-1).view(torch.uint8)
        info = TensorInfo("x", dtype, shape, start, start + len(expected), strides)
        pieces = [bytes(piece) for piece in tensor_pieces(file, info)]
        assert b"".join(pieces) == bytes(expected.tolist()), (shape, strides)
        assert max(map(len, pieces)) <= 64
        assert DTYPE_BITS[dtype] == 8 * view.itemsize
    os.close(file)


@pytest.mark.parametrize(("ties", "is_written"), [(True, False), (False, True), (None, True)])
def test_tied_output_embedding_is_left_out_where_the_config_ties(
    ties: bool | None, is_written: bool, state: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    config = llama_config(4) | {"tie_word_embeddings": ties}
    save_pickled(tmp_path / "base", state, {k: v for k, v in config.items() if v is not None})
    report = dus(
        "upscale", tmp_path / "base", "--trim", "1", "-o", tmp_path / "out", "--json"
    ).report
    written = rows_of(tmp_path / "out")
    assert ("lm_head.weight" in written) is is_written
    assert written["model.embed_tokens.weight"].equal(state["model.embed_tokens.weight"])
    assert report["tensors"] == len(written)
    assert dus("verify", tmp_path / "out", "--base", tmp_path / "base").returncode == 0


def test_output_embedding_of_its_own_is_kept_whatever_the_config_says(
    state: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    save_pickled(tmp_path / "base", state, llama_config(4) | {"tie_word_embeddings": True})
    dus("upscale", tmp_path / "base", "--trim", "1", "-o", tmp_path / "out", "-q")
    assert rows_of(tmp_path / "out")["lm_head.weight"].equal(state["lm_head.weight"])


def test_model_saved_by_torch_computes_the_same_from_the_output(tmp_path: Path) -> None:
    """A map of every layer once is the base: saved as a pickle, written as safetensors, equal to
    the last bit.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(**llama_config(4) | {"tie_word_embeddings": True})
    model = AutoModelForCausalLM.from_config(config).eval()
    save_pickled(
        tmp_path / "base",
        model.state_dict(),
        config.to_dict() | {"architectures": ["LlamaForCausalLM"]},
    )
    assert (
        dus(
            "upscale", tmp_path / "base", "--layers", "0:4", "-o", tmp_path / "out", "-q"
        ).returncode
        == 0
    )
    loaded, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not any(info.values())
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert loaded.eval()(ids).logits.equal(model(ids).logits)


def test_safetensors_win_and_the_pickle_beside_them_is_not_opened(
    base: Path, tmp_path: Path
) -> None:
    torch.save(Payload(tmp_path / "ran"), base / NAME)
    (base / INDEX).write_text("{")
    report = dus("upscale", base, "--trim", "1", "-o", tmp_path / "out", "--json").report
    assert report["base_format"] == "safetensors"
    assert not (tmp_path / "ran").exists()
    assert not list((tmp_path / "out").glob("*.bin*"))


def test_record_card_and_summary_say_that_the_base_was_pickled(
    state: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    base = save_pickled(tmp_path / "base", state, llama_config(4), num_shards=2)
    run = dus("upscale", base, "--trim", "1", "-o", tmp_path / "out")
    assert "safetensors (the base's weights are pickled)" in run.stdout
    assert (
        "The base's weights were pickled; these are safetensors"
        in (tmp_path / "out/README.md").read_text()
    )
    record = json.loads((tmp_path / "out/dus.json").read_text())["base"]
    shards = sorted(base.glob("pytorch_model-*.bin"))
    assert record["format"] == "pickle"
    assert record["shards"] == {path.name: path.stat().st_size for path in shards}
    assert len(record["index_sha256"]) == 64


def test_verify_finds_one_flipped_bit_in_a_transposed_tensor(
    state: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    state[UP.format(1)] = state[UP.format(1)].t().contiguous().t()
    base = save_pickled(tmp_path / "base", state, llama_config(4))
    dus("upscale", base, "--trim", "1", "-o", tmp_path / "out", "-q")
    state[UP.format(1)].view(torch.int16)[77, 33] ^= 1
    save_pickled(base, state, llama_config(4))
    found = json.loads(dus("verify", tmp_path / "out", "--base", base, "--json").stdout)
    assert len(found["problems"]) == 2  # both copies
    assert UP.format(1) in found["problems"][0]


def peak_memory(*arguments: str | Path) -> int:
    """Bytes that the command held at most: of its own, where ru_maxrss also counts the process
    that forked it.
    """
    code = (
        "import sys, contextlib\n"
        "from dus_cli.cli import main\n"
        f"sys.argv = ['dus', *{[str(argument) for argument in arguments]!r}]\n"
        "with contextlib.suppress(SystemExit): main()\n"
        "print([line.split()[1] for line in open('/proc/self/status') if "
        "line.startswith('VmHWM')][0])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return int(done.stdout) * 1024


def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    peaks = []
    for hidden in (768, 2048):  # 60 MB, which fills the buffers of four threads, and 400 MB
        state = random_tensors(llama_tensors(4, hidden, 4 * hidden, hidden, 4096))
        state[UP.format(1)] = state[UP.format(1)].t().contiguous().t()
        num_bytes = sum(tensor.nbytes for tensor in state.values())
        base = save_pickled(tmp_path / "base", state, llama_config(4, hidden, 4 * hidden, 4096))
        options = "--trim 1 --overwrite --copy-mode copy --verify full -q".split()
        peaks.append(peak_memory("upscale", base, "-o", tmp_path / "out", *options))
    assert num_bytes > 380_000_000
    assert peaks[1] - peaks[0] < 30_000_000, peaks


# --- hostile pickles ----------------------------------------------------------------------------


class Calls:
    """Calls a function when it is unpickled."""

    def __init__(self, function: Callable[..., Any], *arguments: object) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.function, self.arguments


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize(
    ("function", "argument", "named"),
    [
        (os.system, "touch {}", "posix.system"),
        (builtins.eval, "open('{}', 'w')", "eval"),
        (builtins.exec, "open('{}', 'w')", "exec"),
        (builtins.getattr, "x", "getattr"),
        (subprocess.Popen, ("touch", "{}"), "Popen"),
        (runpy.run_path, "{}", "runpy.run_path"),
        (torch.load, "{}", "torch.serialization.load"),
        (torch.hub.load, "{}", "torch.hub.load"),
        (builtins.bytearray, 10**12, "bytearray"),
        (torch.Tensor, 10**6, "torch.Tensor"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_pickle_that_calls_is_refused_by_name_and_not_run(
    function: Callable[..., Any], argument: Any, named: str, protocol: int, tmp_path: Path
) -> None:
    mark = tmp_path / "ran"
    if isinstance(argument, str):
        argument = argument.format(mark)
    elif isinstance(argument, tuple):
        argument = tuple(part.format(mark) for part in argument)
    content = {"lm_head.weight": Calls(function, argument), "x": torch.zeros(3)}
    parts = [named] if protocol == 2 else ["STACK_GLOBAL"]
    refuse_saved(tmp_path / "m", content, NAME, *parts, pickle_protocol=protocol)
    torch.save(Calls(function, argument), tmp_path / "x.bin", pickle_protocol=protocol)
    refuse_file(tmp_path / "x.bin", *parts)
    assert not mark.exists()


def test_pickle_of_the_older_format_that_calls_is_refused(tmp_path: Path) -> None:
    content = {"lm_head.weight": Payload(tmp_path / "ran"), "x": torch.zeros(3)}
    refuse_saved(tmp_path / "m", content, "posix.system", _use_new_zipfile_serialization=False)
    assert not (tmp_path / "ran").exists()


def test_damage_to_a_file_of_the_older_format_is_named(
    state: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    base = save_pickled(tmp_path / "m", state, llama_config(4), as_zip=False)
    path, good = base / NAME, (base / NAME).read_bytes()
    for raw, part in (
        (good[:-1], "truncated"),
        (good + b"x", "followed by other data"),
        (good.replace(b"little_endian" + good[good.index(b"little_endian") + 13 :][:2] + b"\x88",
                      b"little_endian" + good[good.index(b"little_endian") + 13 :][:2] + b"\x89"), "byte order"),
        (good.replace(struct.pack("<Q", 64 * 128), struct.pack("<Q", 64 * 128 - 1)), "truncated or damaged"),
        (good[:3000], NAME),
        (good[:20], NAME),
    ):  # fmt: skip
        path.write_bytes(raw)
        refuse_file(path, part)


def test_pickle_in_one_shard_of_several_is_refused(
    state: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    base = save_pickled(tmp_path / "m", state, llama_config(4), num_shards=3)
    torch.save({"x": Payload(tmp_path / "ran")}, base / "pytorch_model-00003-of-00003.bin")
    refuse(base, "pytorch_model-00003-of-00003.bin", "posix.system", "none of it was run")
    assert not (tmp_path / "ran").exists()


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_bare_pickles_and_old_formats_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(llama_config(4)))
    (folder / NAME).write_bytes(pickle.dumps(Payload(tmp_path / "ran")))
    refuse(folder, "is not a zip archive as torch.save writes it")
    (folder / NAME).write_text("version https://git-lfs.github.com/spec/v1\n")
    refuse_file(folder / NAME, "is a Git LFS pointer, not the file itself")
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), folder / NAME)
    refuse_file(folder / NAME, "TorchScript")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        (
            {"state_dict": {"x": torch.zeros(3)}, "epoch": 3},
            ("holds dicts (state_dict)", "training checkpoint"),
        ),
        ({"module": {"x": torch.zeros(3)}}, ("holds dicts (module)",)),
        ([torch.zeros(3)], ("holds a list",)),
        (torch.zeros(3), ("holds a Tensor",)),
        ({}, ("holds no tensors",)),
        ({"lm_head.weight": torch.zeros(3), "epoch": 3}, ("epoch is a int",)),
        ({3: torch.zeros(3)}, ("names a tensor with a int",)),
        ({"\ud800": torch.zeros(3)}, ("not Unicode",)),
        ({"__metadata__": torch.zeros(3)}, ("__metadata__",)),
        ({"x": torch.zeros(3, dtype=torch.complex128)}, ("tensor x is torch.complex128",)),
        (
            {"x": torch.zeros(3, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)},
            ("tensor x is torch.float4_e2m1fn_x2",),
        ),
        ({"x": torch.zeros(3, dtype=torch.complex64).conj()}, ("tensor x is stored conjugated",)),
        ({"x": torch.eye(3).to_sparse()}, ("torch._utils._rebuild_sparse_tensor",)),
        ({"x": torch.nn.Linear(2, 2)}, ("torch.nn.modules.linear.Linear",)),
        ({"x": torch.zeros(3, device="meta")}, ("_rebuild_meta_tensor_no_storage",)),
    ],
)
def test_what_is_no_state_dict_of_plain_tensors_is_told(
    content: Any, parts: tuple[str, ...], tmp_path: Path
) -> None:
    torch.save(content, tmp_path / NAME)
    refuse_file(tmp_path / NAME, *parts)


def test_training_checkpoint_is_told_by_the_command(tmp_path: Path) -> None:
    refuse_saved(
        tmp_path / "m", {"state_dict": {"x": torch.zeros(3)}}, "state_dict", "save_pretrained"
    )


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_quantised_tensors_are_refused(tmp_path: Path) -> None:
    quantised = torch.quantize_per_tensor(torch.randn(3), 0.1, 0, torch.qint8)
    torch.save({"x": quantised}, tmp_path / NAME)
    refuse_file(tmp_path / NAME, "_rebuild_qtensor")


# --- hostile and damaged archives ---------------------------------------------------------------


def rewrite(path: Path, change: Callable[[str, bytes], bytes | None], **options: Any) -> None:
    """Write the archive anew; `change` gives each member's content, None to leave it out."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", **options) as archive:
        for name, raw in members.items():
            if (content := change(name, raw)) is not None:
                archive.writestr(name, content)


def test_archive_written_anew_by_another_zip_library_is_read(
    state: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    """Storages then start where no formula of torch's says; they are looked for."""
    base = save_pickled(tmp_path / "base", state, llama_config(4))
    rewrite(base / NAME, lambda _, raw: raw)
    assert dus("upscale", base, "--layers", "0:4", "-o", tmp_path / "out", "-q").returncode == 0
    written = rows_of(tmp_path / "out")
    assert all(tensor.equal(written[name]) for name, tensor in state.items())


def test_damage_to_the_archive_is_named(state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    base = save_pickled(tmp_path / "m", state, llama_config(4))
    path, good = base / NAME, (base / NAME).read_bytes()

    def damage(
        *parts: str, **options: Any
    ) -> Callable[[Callable[[str, bytes], bytes | None]], None]:
        def check(change: Callable[[str, bytes], bytes | None]) -> None:
            path.write_bytes(good)
            rewrite(path, change, **options)
            refuse_file(path, *parts)

        return check

    damage("compressed or encrypted", compression=zipfile.ZIP_DEFLATED)(lambda _, raw: raw)
    damage("other byte order", "big")(
        lambda name, raw: b"big" if name.endswith("byteorder") else raw
    )
    damage("without data.pkl")(lambda name, raw: None if name.endswith("data.pkl") else raw)
    damage("weights_only")(lambda name, raw: None if name.endswith("data/7") else raw)
    damage("beyond its storage")(lambda name, raw: raw[:-2] if name.endswith("data/7") else raw)
    damage("data.pkl is not a pickle")(
        lambda name, raw: raw[:-1] if name.endswith("data.pkl") else raw
    )
    damage("data.pkl has", "more than any state dict")(
        lambda name, raw: bytes(17_000_000) if name.endswith("data.pkl") else raw
    )
    for size in (0, 1, 100, len(good) // 2, len(good) - 1):
        path.write_bytes(good[:size])
        refuse_file(path)
    refuse(base, NAME)


def test_storage_whose_key_is_no_number_is_refused(tmp_path: Path) -> None:
    torch.save({"x": torch.zeros(3)}, tmp_path / NAME)
    with zipfile.ZipFile(tmp_path / NAME) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(tmp_path / NAME, "w") as archive:
        for name, raw in members.items():
            key = struct.pack("<I", 1)
            archive.writestr(
                name.replace("data/0", "data/?"), raw.replace(b"X" + key + b"0", b"X" + key + b"?")
            )
    refuse_file(tmp_path / NAME, "names a storage ?")


def directory_entry(raw: bytearray, name: str) -> int:
    """Where the zip directory's entry of a member starts; its name lies 46 bytes further."""
    return raw.rindex(name.encode(), 0, len(raw)) - 46


@pytest.mark.parametrize(
    ("field", "value", "part"),
    [
        (42, lambda offset: offset, "overlaps the member before it"),  # the place of another member
        (42, lambda _: 0xFFFFFFF0, ""),  # far beyond the file
        (42, lambda offset: offset + 4, "not where the directory says"),
    ],
)
def test_member_that_lies_elsewhere_than_torch_puts_it_is_refused(
    field: int,
    value: Callable[[int], int],
    part: str,
    state: dict[str, torch.Tensor],
    tmp_path: Path,
) -> None:
    base = save_pickled(tmp_path / "m", state, llama_config(4))
    raw = bytearray((base / NAME).read_bytes())
    one, other = (directory_entry(raw, f"pytorch_model/data/{key}") for key in (8, 7))
    (offset,) = struct.unpack_from("<I", raw, other + field)
    struct.pack_into("<I", raw, one + field, value(offset))
    (base / NAME).write_bytes(raw)
    refuse_file(base / NAME, part)


def test_member_twice_is_refused(tmp_path: Path) -> None:
    base = write_pickled(tmp_path / "m", llama_tensors(4), llama_config(4))
    with (
        pytest.warns(UserWarning, match="Duplicate name"),
        zipfile.ZipFile(base / NAME, "a") as archive,
    ):
        archive.writestr("pytorch_model/data.pkl", pickle.dumps(Payload(tmp_path / "ran"), 2))
    refuse_file(base / NAME, "data.pkl twice")
    assert not (tmp_path / "ran").exists()


def saved_bytes(as_zip: bool) -> bytes:
    """Three tensors as torch saves them, always the same bytes: the old form names and sorts
    storages by address.
    """
    one, two, three = sorted((torch.arange(12.0) for _ in range(3)), key=address)
    content = {
        "a": one.reshape(3, 4).t(),
        "b": two.view(torch.bfloat16)[:5],
        "c": three.reshape(6, 2)[1],
    }
    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=as_zip)
    raw = buffer.getvalue()
    for number, tensor in enumerate(content.values()):
        key, fixed = address(tensor).encode(), f"10000000000000{number}".encode()
        raw = raw.replace(struct.pack("<I", len(key)) + key, struct.pack("<I", len(fixed)) + fixed)
    return raw


def address(tensor: torch.Tensor) -> str:
    return str(tensor.untyped_storage()._cdata)


@pytest.mark.parametrize("as_zip", [True, False])
def test_of_2000_damaged_files_all_end_in_tensors_within_the_file_or_one_line(
    as_zip: bool, tmp_path: Path
) -> None:
    """Counted on the same bytes in every run: a file with a changing address in it crossed the
    bound by chance.
    """
    good, rng = saved_bytes(as_zip), random.Random(1603)
    # Turn by turn the pickle and what surrounds it, and the zip's directory; data itself may be
    # anything.
    spans = (
        [(0, good.index(b"PK\3\4", 4)), (good.index(b"PK\1\2"), len(good))]
        if as_zip
        else [(15, len(good))]
    )
    path, outcomes = tmp_path / "x.bin", {"read": 0, "refused": 0}
    for number in range(2000):
        start, end = spans[number % len(spans)]
        path.write_bytes(good[:start] + mutate(good[start:end], rng) + good[end:])
        problem = one_line_problem(lambda: check_places(path))
        outcomes["read" if problem is None else "refused"] += 1
    assert min(outcomes.values()) > 60, outcomes


def test_torchs_objection_is_told_without_its_advice_to_run_the_file(tmp_path: Path) -> None:
    """Torch itself says that weights_only=False will likely succeed, at length."""
    path = tmp_path / "x.bin"
    raw = saved_bytes(as_zip=False)
    assert b"BFloat16Storage" in raw
    path.write_bytes(raw.replace(b"BFloat16Storage", b"BFloat17Storage"))
    problem = one_line_problem(lambda: read_pickled(path, path.name))
    assert problem is not None
    assert "GLOBAL torch.BFloat17Storage was not an allowed global by default)" in problem
    assert "arbitrary code" not in problem
    assert len(problem) < 400


def check_places(path: Path) -> None:
    size = path.stat().st_size
    for tensor in read_pickled(path, path.name).tensors:
        reach = (
            strided.span(tensor.shape, tensor.strides or ())
            if tensor.strides
            else tensor.num_elements
        )
        assert 0 <= tensor.start <= tensor.start + reach * DTYPE_BITS[tensor.dtype] // 8 <= size


# --- folders ------------------------------------------------------------------------------------


def test_index_and_shards_must_agree(state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    base = save_pickled(tmp_path / "m", state, llama_config(4), num_shards=3)
    weight_map: dict[str, str] = json.loads((base / INDEX).read_text())["weight_map"]
    first, second, _ = sorted(set(weight_map.values()))
    for change, part in (
        ({"model.layers.4.mlp.up_proj.weight": first}, "which no shard holds and the model needs"),
        ({"lm_head.weight": "pytorch_model-9.bin"}, "missing from"),
        ({"lm_head.weight": "../pytorch_model.bin"}, "points outside"),
        ({"lm_head.weight": "model.safetensors"}, "not a pickled file"),
    ):
        (base / INDEX).write_text(json.dumps({"weight_map": weight_map | change}))
        refuse(base, part)
    (base / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    shutil.copyfile(base / first, base / second)
    refuse(base, "two shards")


def test_what_transformers_does_not_mind_in_an_index_is_a_warning(
    state: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    """It takes the shards' names alone from there, of pickles as of safetensors."""
    base = save_pickled(tmp_path / "m", state, llama_config(4), num_shards=3)
    index: dict[str, Any] = json.loads((base / INDEX).read_text())
    weight_map: dict[str, str] = index["weight_map"]
    first, _, last = sorted(set(weight_map.values()))
    place = weight_map["lm_head.weight"]
    change = {"model.layers.0.ghost": first, "lm_head.weight": first if place == last else last}
    assert (
        dus("upscale", base, "--trim", "1", "-o", tmp_path / "agrees", "--json").report["warnings"]
        == []
    )
    (base / INDEX).write_text(json.dumps(index | {"weight_map": weight_map | change}))
    _, info = transformers.AutoModelForCausalLM.from_pretrained(base, output_loading_info=True)
    assert not any(info.values())
    warnings = dus("upscale", base, "--trim", "1", "-o", tmp_path / "differs", "--json").report[
        "warnings"
    ]
    assert (
        f"{INDEX} names model.layers.0.ghost, which no shard holds: transformers loads the model "
        "without" in warnings
    )
    assert any(f"{INDEX} names lm_head.weight, in other shards" in warning for warning in warnings)
    assert names_and_bytes(tmp_path / "differs") == names_and_bytes(tmp_path / "agrees")


def test_without_torch_it_says_what_to_install(tmp_path: Path) -> None:
    base = write_pickled(tmp_path / "base", llama_tensors(4), llama_config(4))
    (tmp_path / "site").mkdir()
    (tmp_path / "site/sitecustomize.py").write_text("import sys\nsys.modules['torch'] = None\n")
    path = f"{tmp_path / 'site'}:{Path(__file__).parent.parent}"
    run = started_dus("upscale", base, "--trim", "1", "-o", tmp_path / "out", "-q", PYTHONPATH=path)
    run.assert_one_line_error(NAME, "pip install 'dus-cli[heal]'")


def test_healing_a_pickled_model_says_what_to_do(tmp_path: Path) -> None:
    base = write_pickled(tmp_path / "base", llama_tensors(4), llama_config(4))
    (tmp_path / "text.txt").write_text("text")
    run = dus(
        "heal",
        base,
        "--data",
        tmp_path / "text.txt",
        "--tokens",
        "1K",
        "-o",
        tmp_path / "out",
        "-q",
    )
    run.assert_one_line_error("holds pickled weights", "dus upscale")


def test_shards_are_full_although_every_tensor_starts_elsewhere_in_its_block(
    tmp_path: Path,
) -> None:
    """Between any two tensors of a pickle lies a zip header: no run of them agrees with the
    output's blocks.
    """
    tensors, config = llama_tensors(4, 256, 512), llama_config(4, 256, 512)
    write_pickled(tmp_path / "pickled", tensors, config)
    write_checkpoint(tmp_path / "plain", tensors, config, fill=fill_randomly)
    counts = [
        len(dus("upscale", tmp_path / name, "--trim", "1", "--max-shard-size", "2MB", "-o", tmp_path / f"{name}-out",
                "--json").report["shards"])
        for name in ("pickled", "plain")
    ]  # fmt: skip
    assert counts[0] <= counts[1]


def test_transposed_tensors_are_cast_and_zeroed_on_the_way(tmp_path: Path) -> None:
    state = random_tensors(llama_tensors(4, dtype="F32"))
    state = {name: t.t().contiguous().t() if t.dim() == 2 else t for name, t in state.items()}
    base = save_pickled(tmp_path / "base", state, llama_config(4))
    options = ["--trim", "1", "--identity", "--dtype", "bfloat16", "--verify", "full", "--json"]
    report = dus("upscale", base, *options, "-o", tmp_path / "out").report
    assert report["bytes_cast"] + report["bytes_zeros"] == report["bytes"]
    embeddings = (
        state["model.embed_tokens.weight"]
        .bfloat16()
        .contiguous()
        .view(torch.uint8)
        .numpy()
        .tobytes()
    )
    assert names_and_bytes(tmp_path / "out")["model.embed_tokens.weight"][2] == embeddings
    assert problems(tmp_path / "out", "--base", base) == []
