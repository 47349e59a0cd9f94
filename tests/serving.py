"""A tiny random served model for tests, with one token per word, over a real socket or in the same process."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import uvicorn
from models import VOCABULARY, engine
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from kv_transition.cache.state import STATISTICS
from kv_transition.engines.local import LocalEngine
from kv_transition.serve.app import create_app
from kv_transition.serve.model import Served
from kv_transition.serve.prefills import Prefills

NAME = "tiny"
CHAT = (
    "{% for m in messages %}w1 {{ m.role }} {{ m.content }} w2 {% endfor %}{% if add_generation_prompt %}w1{% endif %}"
)


def words() -> PreTrainedTokenizerFast:
    """Return a tokenizer with the words w0 to w93 and three words of a chat template."""
    names = [f"w{i}" for i in range(VOCABULARY - 3)] + ["system", "user", "assistant"]
    tokenizer = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    fast.chat_template = CHAT
    return fast


def served(*, max_bytes: int = 10**9, statistics: frozenset[str] = STATISTICS, max_length: int = 1024) -> Served:
    own = LocalEngine(engine("qwen2").model, words())
    return Served(NAME, own, Prefills(own, max_bytes, statistics), max_length)


@contextlib.contextmanager
def listening(model: Served, **options: Any) -> Iterator[str]:
    """Yield the address of a server that runs until the block ends."""
    app = create_app(model, **options)
    with socket.create_server(("127.0.0.1", 0), backlog=512) as listener:
        server = uvicorn.Server(uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=2))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(60)
            assert not thread.is_alive()


def ask(client: Any, path: str = "completions", status: int = 200, **body: Any) -> dict[str, Any]:
    """Return the answer to a greedy request of six tokens, unless ``body`` changes it; the response must have
    ``status``."""
    body = {"model": NAME, "temperature": 0, "max_tokens": 6} | body
    got = client.post(f"/v1/{path}", json=body)
    assert got.status_code == status, got.text
    return got.json()


def chat_body(*texts: str, **more: Any) -> dict[str, Any]:
    """Return arguments for `ask`: a system message and a user message."""
    messages = [{"role": role, "content": text} for role, text in zip(["system", "user"], texts, strict=False)]
    return {"path": "chat/completions", "messages": messages} | more
