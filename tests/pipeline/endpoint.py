"""A served model of random weights: its folder, its parameters, and an application under uvicorn."""

import json
import socket
import threading
from pathlib import Path

import httpx2 as httpx
import openai
import uvicorn

from model import ModelConfig, build, save_pretrained
from model.config import HEAVY, SLIDING, SPARSE
from pipelines.encode import CHAT_TEMPLATE, EOS, SPECIAL, train_tokenizer
from pipelines.params import Serve
from pipelines.serving.app import create_app
from pipelines.serving.ledger import Ledger
from pipelines.serving.manager import Manager

NAME, TOKEN = "tiny", "a-token-of-enough-characters"
PARAMS = Serve(max_batch=6, max_queue=8, max_new_tokens=16, max_body_kib=256)
CONFIG = ModelConfig(
    vocab_size=400, hidden_size=32, moe_intermediate_size=16, num_hidden_layers=3, num_attention_heads=2,
    q_lora_rank=16, head_dim=16, qk_rope_head_dim=8, n_routed_experts=4, num_nextn_predict_layers=1, o_lora_rank=8,
    layer_types=[SLIDING, SPARSE, HEAVY], compress_rates={SPARSE: 4, HEAVY: 8}, sliding_window=16, index_n_heads=8,
    index_head_dim=8, index_topk=4, initializer_range=0.15, max_position_embeddings=1024,
)  # fmt: skip


class Endpoint:
    """An application under uvicorn in a thread."""

    def __init__(self, manager: Manager, folder: Path, callers: dict[str, str] | None = None) -> None:
        self.manager, self.ledger_file = manager, folder / "usage.db"
        self._ledger = Ledger(self.ledger_file, PARAMS)
        listening = socket.create_server(("127.0.0.1", 0))
        self.address = f"http://127.0.0.1:{listening.getsockname()[1]}"
        app = create_app(manager, PARAMS, self._ledger, callers)
        self._server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
        self._thread = threading.Thread(target=self._server.run, args=([listening],))
        self._thread.start()
        self.client = openai.OpenAI(base_url=f"{self.address}/v1", api_key=TOKEN, max_retries=0, timeout=60)
        self.http = httpx.Client(base_url=self.address, timeout=60)

    def close(self) -> None:
        self.client.close()
        self.http.close()
        self._server.should_exit = True
        self._thread.join()
        self._ledger.close()


def made(folder: Path, seed: int) -> Path:
    """An exported folder with a random model."""
    folder.mkdir()
    text = Path(json.__file__).read_text(encoding="utf-8").splitlines()
    train_tokenizer(CONFIG.vocab_size, text).save(str(folder / "tokenizer.json"))
    names = {"bos_token": SPECIAL[0], "eos_token": SPECIAL[EOS], "chat_template": CHAT_TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    net = build(CONFIG, seed)
    save_pretrained(net, folder)
    return folder
