"""Word-level tokenizers and chat templates of all kinds, for tests of conversations."""

from __future__ import annotations

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

WORDS = ["<pad>", "<bos>", "<eos>", "<start>", "<end>", *(f"w{i}" for i in range(80))]
SPECIAL = ["<pad>", "<bos>", "<eos>", "<start>", "<end>"]
PLAIN_WORDS = ["User:", "Assistant:", "user", "model", "assistant", "system"]

# As in Gemma's template, the system message is part of the first user turn, and texts are stripped.
FOLDING = """<bos>{% if messages[0].role == 'system' %}{% set first = messages[0].content | trim + ' ' %}\
{% set rest = messages[1:] %}{% else %}{% set first = '' %}{% set rest = messages %}{% endif %}\
{% for message in rest %}<start>{{ 'model' if message.role == 'assistant' else 'user' }}
{{ first if loop.first else '' }}{{ message.content | trim }}<end>
{% endfor %}{% if add_generation_prompt %}<start>model
{% endif %}"""

SEPARATE = """{% for message in messages %}<start>{{ message.role }}
{{ message.content }}<end>
{% endfor %}{% if add_generation_prompt %}<start>assistant
{% endif %}"""

# Only the last user turn has the mark.
MARKS_THE_LAST = """{% for message in messages %}<start>{{ message.role }} {% if message.role == 'user' and\
 not messages[loop.index:] | selectattr('role', 'equalto', 'user') | list %}w1 {% endif %}{{ message.content }}<end>\
{% endfor %}{% if add_generation_prompt %}<start>assistant {% endif %}"""

LEAVES_THOUGHTS_OUT = """{% for message in messages %}<start>{{ message.role }} {% if message.role == 'assistant' %}\
{{ message.content.split('</think>')[-1] }}{% else %}{{ message.content }}{% endif %}<end>\
{% endfor %}{% if add_generation_prompt %}<start>assistant {% endif %}"""

REFUSES_THE_SYSTEM = """{% for message in messages %}{% if message.role == 'system' %}\
{{ raise_exception('there is no system here') }}{% endif %}<start>{{ message.role }} {{ message.content }}<end>\
{% endfor %}{% if add_generation_prompt %}<start>assistant {% endif %}"""


def word_tokenizer(template: str | None = None) -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token per word. It has 91 tokens, fewer than the vocabulary of the tiny models."""
    vocabulary = {word: i for i, word in enumerate([*WORDS, *PLAIN_WORDS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<bos>", eos_token="<eos>", additional_special_tokens=["<start>", "<end>"]
    )
    tokenizer.chat_template = template
    return tokenizer


def text(n: int, start: int = 0) -> str:
    """Return a text of ``n`` words."""
    return " ".join(f"w{(start + i) % 80}" for i in range(n))
