"""Column types and keys that several tables share, and the columns of the tables of examples."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pyarrow as pa

TEXT, TEXTS, INT, INTS, FLOAT = pa.string(), pa.list_(pa.string()), pa.int64(), pa.list_(pa.int32()), pa.float64()

# An example as any source provides it. `meta` is a JSON object.
SOURCE = pa.schema(
    {
        "task": TEXT,
        "example_id": TEXT,
        "question": TEXT,
        "context": TEXT,
        "answers": TEXTS,
        "all_classes": TEXTS,
        "meta": TEXT,
    }
)

# token_len: number of tokens of the whole prompt before truncation. prompt_len: number of tokens that the model reads.
EXAMPLES = pa.schema([*SOURCE, pa.field("token_len", INT), pa.field("prompt_len", INT)])

# A chosen example, ready to run: the prompt in its two segments, as text and as token ids. content_start, content_end:
# the prompt without its chat template is context_text from content_start on and question_text up to content_end; null
# if the template cannot be separated. context_sha256: hash of the context before truncation; several examples may share
# a context, but truncation depends on the question.
BIN = pa.schema(
    [
        *EXAMPLES.remove(EXAMPLES.get_field_index("context")),
        pa.field("bin", INT),
        pa.field("prompt_sha256", TEXT),
        pa.field("context_sha256", TEXT),
        pa.field("context_text", TEXT),
        pa.field("question_text", TEXT),
        pa.field("content_start", INT),
        pa.field("content_end", INT),
        pa.field("context_ids", INTS),
        pa.field("question_ids", INTS),
        pa.field("max_new_tokens", INT),
    ]
)


def cluster_of(example: Mapping[str, Any]) -> str | None:
    """Return the cluster of an example of `BIN`: examples about one context are not independent."""
    return (example.get("context_sha256") or "")[:16] or None


# n: number of examples. clusters: number of documents; equal to n if each example has its own document.
ESTIMATE = {"estimate": FLOAT, "ci_low": FLOAT, "ci_high": FLOAT, "n": INT, "method": TEXT, "clusters": INT}
CELL_KEY = {"task": TEXT, "mode": TEXT, "policy": TEXT, "budget": TEXT, "bin": INT}
TESTED = {"p_value": FLOAT, "p_holm": FLOAT, "family": TEXT}
RATIO = {"ratio": FLOAT, "ratio_low": FLOAT, "ratio_high": FLOAT}
