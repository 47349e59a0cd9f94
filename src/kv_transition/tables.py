"""Column types and keys that several tables share, and the tables of examples, which several studies read."""

from __future__ import annotations

import pyarrow as pa

TEXT, TEXTS, INT, INTS, FLOAT = pa.string(), pa.list_(pa.string()), pa.int64(), pa.list_(pa.int32()), pa.float64()

# An example as its source gives it, whatever the source. `meta` is a JSON object.
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

# token_len: tokens of the whole prompt before truncation; prompt_len: as fed to the model.
EXAMPLES = pa.schema([*SOURCE, pa.field("token_len", INT), pa.field("prompt_len", INT)])

# A chosen example, ready to run: the prompt in its two segments, as text and as token ids. Without its chat template it
# is context_text from content_start on and question_text up to content_end; null: the two cannot be told apart.
# context_sha256: of the context as its source has it, which examples may share; truncation depends on the question.
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

# n counts examples, clusters the documents that they share: as many, where each has its own.
ESTIMATE = {"estimate": FLOAT, "ci_low": FLOAT, "ci_high": FLOAT, "n": INT, "method": TEXT, "clusters": INT}
CELL_KEY = {"task": TEXT, "mode": TEXT, "policy": TEXT, "budget": TEXT, "bin": INT}
TESTED = {"p_value": FLOAT, "p_holm": FLOAT, "family": TEXT}
RATIO = {"ratio": FLOAT, "ratio_low": FLOAT, "ratio_high": FLOAT}
