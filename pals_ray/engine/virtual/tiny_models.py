"""Two model folders small enough for two CPU cores: a Llama-type dense one and a Qwen3-MoE-type one.

Their content is in `tiny_models.json` beside this module. They hold no weights (vLLM makes random ones with
`load_format="dummy"`) and share a byte-level BPE tokenizer without merges, in which a token's id is the byte that it
stands for, so that any output decodes to valid text. The attention heads have 32 dimensions, one head for each rank at
tensor parallel 2: vLLM's CPU attention takes no smaller ones.

There is no end-of-sequence token: with random weights one would come about every 256 tokens and end requests at random.
The special tokens are null in the configuration, because the architectures' own defaults are 1 and 2, which are
ordinary bytes here. A request ends at its `max_tokens`, at the context's end, or at the `stop` or `stop_token_ids` that
it names, with or without `ignore_eos`. Structured output needs such a token, so a request for it ends with an error.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from importlib.resources import files
from pathlib import Path
from typing import Any

from filelock import FileLock

_DATA: dict[str, Any] = json.loads(files(__package__).joinpath("tiny_models.json").read_text())

#: `config.json` by model name.
CONFIGS: dict[str, dict[str, Any]] = _DATA["configs"]


def make_tiny_model(name: str, directory: Path) -> Path:
    """The folder `directory/name`, written unless it holds this content already; never visible half-written.

    Raises `KeyError` for a name that is not in `CONFIGS`.
    """
    contents = {
        "config.json": CONFIGS[name],
        "generation_config.json": _DATA["generation_config"],
        "tokenizer.json": _byte_tokenizer(),
        "tokenizer_config.json": _DATA["tokenizer_config"],
    }
    texts = {file: json.dumps(content, indent=1) + "\n" for file, content in contents.items()}
    folder = directory / name
    if _holds(folder, texts):
        return folder
    directory.mkdir(parents=True, exist_ok=True)
    # Replicas of one node start together: the first writes the folder, the others wait for the lock and find it.
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
    """The `tokenizers` file, with the byte as every token's id."""
    tokenizer: dict[str, Any] = _DATA["tokenizer"]
    vocab = {symbol: byte for byte, symbol in enumerate(_byte_symbols())}
    return tokenizer | {"model": tokenizer["model"] | {"vocab": vocab}}


def _byte_symbols() -> list[str]:
    """The printable character that byte-level BPE (GPT-2) writes for each byte: the byte's own where it has one."""
    own = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    substitutes = iter(range(256, 512))
    return [chr(byte) if byte in own else chr(next(substitutes)) for byte in range(256)]
