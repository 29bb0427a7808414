"""Two model folders small enough for two CPU cores: a Llama-type dense one and a Qwen3-MoE-type one.

They hold no weights (vLLM makes random ones with `load_format="dummy"`) and share a byte-level tokenizer in which a
token's id is the byte it stands for, so that any output decodes to valid text. They have no end-of-sequence token: with
random weights one would come about every 256 tokens and end requests at random. A request ends at its `max_tokens`, at
the context's end, or at the `stop` or `stop_token_ids` that it names, with or without `ignore_eos`. (Structured output
needs such a token, so a request for it ends with an error.)
"""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from filelock import FileLock

_MAX_POSITIONS = 8192

_SHARED: dict[str, Any] = {
    "torch_dtype": "float32",
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    # One head of 32 per rank at tensor parallel 2: the smallest head that vLLM's CPU attention takes.
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "hidden_act": "silu",
    "max_position_embeddings": _MAX_POSITIONS,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "attention_bias": False,
    "tie_word_embeddings": False,
    # Said, because the architectures' own defaults are 1 and 2, which are ordinary bytes here.
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}

#: `config.json` by model name.
CONFIGS: dict[str, dict[str, Any]] = {
    "tiny-dense": {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **_SHARED},
    "tiny-moe": {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        **_SHARED,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 64,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    },
}

_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def make_tiny_model(name: str, directory: Path) -> Path:
    """The folder `directory/name`, written if it is not there with this content; complete or absent at any instant.

    Raises `KeyError` for a name that is not in `CONFIGS`.
    """
    files = {
        "config.json": CONFIGS[name],
        "generation_config.json": {"bos_token_id": None, "eos_token_id": None},
        "tokenizer.json": _byte_tokenizer(),
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": _MAX_POSITIONS,
            "clean_up_tokenization_spaces": False,
            "chat_template": _CHAT_TEMPLATE,
        },
    }
    texts = {file: json.dumps(content, indent=1) + "\n" for file, content in files.items()}
    folder = directory / name
    if _holds(folder, texts):
        return folder
    directory.mkdir(parents=True, exist_ok=True)
    # Replicas of one node start together: one writes, the others wait and find it written.
    with FileLock(directory.with_name(f"{directory.name}.lock"), timeout=60):
        if not _holds(folder, texts):
            _write(folder, texts)
    return folder


def _write(folder: Path, texts: dict[str, str]) -> None:
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    temporary.chmod(0o755)
    for file, text in texts.items():
        (temporary / file).write_text(text)
    if folder.exists():
        shutil.rmtree(folder)
    temporary.rename(folder)


def _holds(folder: Path, texts: dict[str, str]) -> bool:
    return all((folder / file).is_file() and (folder / file).read_text() == text for file, text in texts.items())


def _byte_tokenizer() -> dict[str, Any]:
    """A `tokenizers` byte-level BPE without merges: token id = byte."""
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {symbol: byte for byte, symbol in enumerate(_byte_symbols())},
            "merges": [],
        },
    }


def _byte_symbols() -> list[str]:
    """The printable character that byte-level BPE (GPT-2) writes for each byte: the byte's own where it has one."""
    own = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    substitutes = iter(range(256, 512))
    return [chr(byte) if byte in own else chr(next(substitutes)) for byte in range(256)]
