"""The model's own tokenizer."""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

from kv_transition.data import gguf, gguf_tokenizer
from kv_transition.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TEMPLATE_DATE = "01 Jan 2024"
"""date for chat templates that otherwise write today's date into a prompt"""

_PROBE = "In 1850, naïve Zoë's\ttests:  café №7\n\n- 漢字 and f(x) = 3.14!"


def load_tokenizer(name: str, revision: str | None = None) -> PreTrainedTokenizerFast:
    """Return the tokenizer of a model.

    If a local folder has a sub-folder ``tokenizer``, its tokenizer.json is used exactly as it is. Otherwise
    AutoTokenizer chooses a class by the model type in config.json. That class may rebuild the tokenizer and return
    other ids than the folder's tokenizer.json, which raises UserError.

    Args:
        name: local folder, hub id or GGUF file of the model.
        revision: commit of the hub repository.

    Raises:
        UserError: there is no such tokenizer, it has no fast version, or its ids differ from those of its own file.
    """
    if gguf.is_gguf(name):
        return load_tokenizer(str(gguf_tokenizer.tokenizer_folder(name).parent))
    folder = Path(name)
    try:
        # broad, because the tokenizers library raises bare Exceptions for damaged files
        if (folder / "tokenizer").is_dir():
            from transformers import PreTrainedTokenizerFast

            return PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer")
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(
            name, revision=None if folder.is_dir() else revision, trust_remote_code=False
        )
    except Exception as error:
        cause = str(error).strip().split("\n")[0] or type(error).__name__
        where = "in this folder" if folder.is_dir() else "as a folder here or on the hub"
        raise UserError(f"model.name: no tokenizer of {name!r} can be loaded {where}: {cause}") from None
    if not tokenizer.is_fast:
        raise UserError(f"model.name: the tokenizer of {name!r} has no fast version (tokenizer.json), which is needed")
    if not tokenizer(_PROBE, add_special_tokens=False)["input_ids"]:
        # some classes return an empty tokenizer if there is no file
        raise UserError(
            f"model.name: the tokenizer of {name!r} has no vocabulary; put its tokenizer.json next to the weights"
        )
    if (folder / "tokenizer.json").is_file():
        _check_ids(tokenizer, folder)
    return tokenizer


def _check_ids(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    from tokenizers import Tokenizer

    own = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(_PROBE, add_special_tokens=False).ids
    if tokenizer(_PROBE, add_special_tokens=False)["input_ids"] != own:
        raise UserError(
            f"model.name: transformers reads the tokenizer in {folder} as {type(tokenizer).__name__}, which gives "
            "other ids than its tokenizer.json; move its files into a sub-folder 'tokenizer' to use them as they are"
        )


def tokenizer_sha256(tokenizer: PreTrainedTokenizerFast) -> str:
    """Return a hash of everything that determines token ids: the tokenizer and its chat template."""
    content = sha256(tokenizer.backend_tokenizer.to_str().encode())
    content.update(str(tokenizer.chat_template).encode())
    return content.hexdigest()
