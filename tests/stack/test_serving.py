"""Servers that speak OpenAI's protocol, on this machine's loopback."""

from __future__ import annotations

import http.client
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

QUESTION = "What is the capital of France?"


def post(port: int, path: str, body: dict[str, Any]) -> dict[str, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
    connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
    answer = connection.getresponse()
    text = answer.read().decode()
    assert answer.status == 200, text
    said: dict[str, Any] = json.loads(text)
    return said


@pytest.fixture
def server(healed: Path, tmp_path: Path) -> Iterator[int]:
    """`transformers serve HEALED`, once it listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = shutil.which("transformers", path=str(Path(sys.executable).parent)) or "transformers"
    log = (tmp_path / "log").open("w")
    process = subprocess.Popen(
        [
            command,
            "serve",
            str(healed),
            "--host",
            "127.0.0.1",
            "--port",
            str(port),
            "--device",
            "cpu",
        ],
        stdout=log,
        stderr=log,
        env=dict(os.environ),
    )
    try:
        for _ in range(600):
            assert process.poll() is None, (tmp_path / "log").read_text()
            with socket.socket() as client:
                if client.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.5)
        yield port
    finally:
        process.terminate()
        process.wait(60)
        log.close()


def test_transformers_serve_answers_with_what_the_model_writes(
    server: int, healed: Path, tokenizer: Any
) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    messages = [{"role": "user", "content": QUESTION}]
    config = {"max_new_tokens": 8, "do_sample": False}
    body = {
        "model": str(healed),
        "messages": messages,
        "max_tokens": 8,
        "generation_config": json.dumps(config),
    }
    answer = post(server, "/v1/chat/completions", body)["choices"][0]["message"]["content"]
    model = AutoModelForCausalLM.from_pretrained(healed, dtype=torch.bfloat16)
    inputs = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    written = model.generate(**inputs, max_new_tokens=8, do_sample=False)[
        0, inputs["input_ids"].shape[1] :
    ]
    assert answer.strip() == tokenizer.decode(written, skip_special_tokens=True).strip()
