"""A real llama.cpp server with a model of 1 MiB that does as its prompt says.

The model is made here: attention and feed-forward are zero, so that each token depends on the one
before alone, and the weights are a table of which follows which. The chat template ends a prompt
with the token that begins what is wanted: a few letters, letters without end, or the call of a tool.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

TEMPLATE = """\
{%- for m in messages %}
{%- if m.role == 'tool' %}<tool_response>{{ m.content }}</tool_response>
{%- else %}<{{ m.role }}>{{ m.content if m.content is string else '' }}
{%- for c in m.tool_calls or [] %}<tool_call>
{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}
</tool_call>{%- endfor %}{%- endif %}{%- endfor %}
{%- if tools %}<tools>{% for t in tools %}{{ t | tojson }}
{% endfor %}</tools>{%- endif %}
{%- if add_generation_prompt %}<assistant>
{%- if tools and messages[-1].role != 'tool' %}$
{%- elif 'forever' in (messages[-1].content or '') | string %}%
{%- else %}#{%- endif %}{%- endif %}"""
CALL = '<tool_call>\n{"name": "time", "arguments": {}}\n</tool_call>'
WORDS = "hello"  # what the model says, a letter a token
ENDLESS = "xyz"


def make_model(path: Path) -> None:
    """Write the model as GGUF."""
    import gguf
    import numpy as np

    follows = ["#helo", "$", "%xyz"]
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)),
              "ll", *"".join(follows), CALL]  # fmt: skip
    place = {piece: number for number, piece in enumerate(pieces)}
    count, size = len(pieces), (len(pieces) + 31) // 32 * 32
    output = np.zeros((count, size), np.float32)
    chain = ["#h", "he", ("e", "ll"), ("ll", "o"), ("o", "</s>"), ("$", CALL), (CALL, "</s>"),
             "%x", "xy", "yz", "zx"]  # fmt: skip
    for before, after in chain:
        output[place[after], place[before]] = 40
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(32_768)
    writer.add_embedding_length(size)
    writer.add_block_count(1)
    writer.add_feed_forward_length(32)
    writer.add_head_count(1)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(size)
    writer.add_vocab_size(count)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(pieces)
    writer.add_token_scores([0.0] * 259 + [-float(number) for number in range(count - 259)])
    writer.add_token_types([2, 3, 3, *[6] * 256, *[1] * (count - 259)])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_add_bos_token(True)
    writer.add_add_space_prefix(False)
    writer.add_chat_template(TEMPLATE)
    shapes = dict.fromkeys(("attn_q", "attn_k", "attn_v", "attn_output"), (size, size))
    shapes |= {"ffn_gate": (32, size), "ffn_up": (32, size), "ffn_down": (size, 32)}
    writer.add_tensor("token_embd.weight", np.eye(count, size, dtype=np.float32))
    writer.add_tensor("output.weight", output)
    writer.add_tensor("output_norm.weight", np.ones(size, np.float32))
    for name in ("attn_norm", "ffn_norm"):
        writer.add_tensor(f"blk.0.{name}.weight", np.ones(size, np.float32))
    for name, shape in shapes.items():
        writer.add_tensor(f"blk.0.{name}.weight", np.zeros(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


SERVE = """\
import sys, xllamacpp
path, name, port, key = sys.argv[1:]
params = xllamacpp.CommonParams()
params.model.path, params.model_alias, params.port = path, {name}, int(port)
params.hostnames = type(params.hostnames)(["127.0.0.1"])
params.api_keys = type(params.api_keys)([key] if key else [])
params.n_ctx, params.n_parallel, params.n_gpu_layers = 65_536, 2, 0
params.cpuparams.n_threads, params.warmup, params.fit_params = 1, False, False
params.endpoint_slots = True
server = xllamacpp.Server(params)
print(server.listening_address, flush=True)
sys.stdin.read()
"""


class LlamaServer:
    """llama.cpp's server in a process of its own; started again it has the same address."""

    def __init__(self, model: Path) -> None:
        self.model = model
        self.port = 0
        self._process: Any = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self, name: str = "tiny", key: str = "") -> None:
        """Returns when it serves."""
        arguments = [sys.executable, "-c", SERVE, self.model, name, str(self.port), key]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(
            arguments, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True
        )
        self.port = int(self._process.stdout.readline().rpartition(":")[2])

    def kill(self) -> None:
        """As the system does when it has no memory left: SIGKILL."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None
