"""Write docs/policies.md from the docstrings of the policies.

    python -m kv_transition.policies.describe > docs/policies.md

A policy's docstring holds its definition in paragraphs, and paragraphs that begin with ``Source:``, ``Cost:`` or
``Differences:``. The docstring below each field explains that hyper-parameter.
"""

from __future__ import annotations

import ast
import json
import re
import textwrap
from collections.abc import Mapping

from kv_transition.policies import catalog
from kv_transition.policies.catalog import Class, Field

_HEAD = """# Policies

This page defines exactly which entries each policy keeps. It is generated from the source by
`python -m kv_transition.policies.describe`.

N is the number of entries in the cache when it is compressed. A budget keeps K of them in each KV head, protected
entries included (K = ceil(r N), or a number of tokens). d is the number of channels of a head; H and Hkv are the
numbers of query heads and KV heads. Query heads that share a KV head form a group. For every policy:

- The K entries with the highest scores stay; equal scores go to the lower position. Entries that stay keep their
  statistics.
- Protected entries take at most half of K.
- A policy that acts when compressing lets the cache grow by the tokens that are read and generated afterwards; a policy
  that acts at each step holds the cache at K.
- If the last token of the prompt is read again (mode `after_prompt`), its entry stays whatever its score is.
- Layers with a sliding window are not compressed.
- kvpress keeps int(N (1 - compression_ratio)) entries, rounded down from the fraction removed; this project rounds the
  fraction kept up, so the two may differ by one entry at the same nominal budget.

During the prefill, the statistics that a policy names are computed, and no others:

| statistic | of each layer |
|---|---|
| `attn_sum` | attention that each entry received from all queries so far, mean over the group |
| `query_entropy` | entropy of the attention of the query at each entry, nats, mean over the heads |
| `recent_queries` | the last 64 queries, from which their attention can be computed again |
| `output_norm` | L1 norm of each value after the output projection, mean over the group |
| `reconstruction` | greatest attention that each entry received while the model repeated the text |
| `query_mean`, `query_cov` | mean and covariance of the un-rotated queries after the first 4 |
"""

_TAIL = """
## From elsewhere

- **A file**: `kind: path/to/file.py`, or `path/to/file.py:ClassName` if it defines several policies. To check the
  configuration, the file is read but not run. A change of its content makes results stale. It may import from this
  project and from installed packages, but not from files beside it.
- **An installed package**: its entry points in the group `kv_transition.policies` are kinds, under their names.
- **kvpress**: `kvpress.SnapKVPress` and so on name a press of the installed kvpress, with the arguments of its
  constructor as hyper-parameters. A press reads the prompt again, because it needs the model's hidden states.

CONTRIBUTING.md explains how to write a policy.

## Agreement with kvpress and with the authors

`tests/test_kvpress.py` (after `make bench-peers`) lets kvpress 0.5.5 read 700 tokens with the same weights, and
compares the sets of entries that stay in each head of each layer, at equal K, for random models of three families.

| policy | press | conditions under which the sets are equal | cases, all equal |
|---|---|---|---|
| `snapkv` | SnapKVPress | window 64, kernel 5, mean pooling; kernel 7 with max pooling of the group's mean | 24 |
| `adakv` | AdaKVPress(SnapKVPress) | the same window and pooling | 12 |
| `criticalkv` | CriticalKVPress(SnapKVPress) | the same window and pooling | 12 |
| `chunkkv` | ChunkKVPress(SnapKVPress) | window and K are multiples of the chunk | 9 |
| `lagkv` | LagKVPress | K takes the same number of entries from each partition | 9 |
| `kvzip` | KVzipPress | always; the text is repeated in one piece, and in three | 24 |
| `streaming_llm`, `tova`, `knorm`, `keydiff`, `expected_attention` | of the same name | always | 12 each |

kvpress has no `cake` and no `r_kv`. `tests/test_authors.py` compares with the code of the authors, if the environment
variable `KVT_AUTHORS` names a folder with checkouts of it: 400 tokens, budgets 0.8, 0.6, 0.4 and 0.2, the same three
families.

| policy | authors' code | conditions under which the sets are equal | cases, all equal |
|---|---|---|---|
| `cake` | cakekv c4675ce | each layer keeps its whole window; the prompt is longer than K plus the window | 48 |
| `kvzip` | KVzip 5d84729 | the same sinks (theirs are the system prompt); their threshold keeps one entry less | 24 |
| `r_kv` | R-KV d15c976 | up to 512 entries, or `horizon: null`; also after 128 more tokens | 24 |

`cake`, `kvzip` and `r_kv` are also compared with their formulas, evaluated entry by entry
(`tests/test_policies_reading.py`, `tests/test_policies_newer.py`). Both tables were run on 2026-11-30.
"""


_LABELS = ("Source", "Cost", "Differences")


def page() -> str:
    """Return the whole page in Markdown."""
    kinds = [kind for kind in catalog.kinds() if catalog.content(kind) is None]
    rows = [f"| [`{kind}`](#{kind}) | {_title(kind)} | {_acts(kind)} | {_statistics(kind)} |" for kind in kinds]
    table = ["", "| policy | in short | acts | statistics |", "|---|---|---|---|", *rows]
    return "\n".join([_HEAD.rstrip(), *table, _parts(), *map(_section, kinds)]) + "\n" + _TAIL


def _parts() -> str:
    """Return the section on the options that all score policies share."""
    shared = catalog.shared_parts()
    having = [kind for kind in catalog.kinds() if catalog.content(kind) is None and _scores(catalog.describe(kind))]
    names = ", ".join(f"[{kind}](#{kind})" for kind in having)
    intro = f"These are options of {names}. The section of a policy lists the options whose defaults differ."
    return "\n\n".join(
        ["\n## Options of score policies", *map(_wrapped, [intro, *_definition(shared)]), _table(shared.fields)]
    )


def _scores(found: Class) -> bool:
    """Return whether a kind is a score policy, that is, derived from `_scored.Scored`."""
    return found.file == catalog.shared_parts().file or any(map(_scores, found.parents))


def _table(fields: Mapping[str, Field]) -> str:
    rows = [_row(name, field) for name, field in fields.items()]
    return "\n".join(["| hyper-parameter | default | allowed | meaning |", "|---|---|---|---|", *rows])


def _section(kind: str) -> str:
    found = catalog.describe(kind)
    parts = [_title(kind)]
    for parent in found.parents:
        if parent.file == catalog.shared_parts().file:
            parts.append("It has the options of [score policies](#options-of-score-policies).")
        elif parent.file.stem.startswith("_"):
            parts += _definition(parent)
        else:
            parts.append(f"Builds on [{parent.file.stem}](#{parent.file.stem}).")
    parts = [f"\n## {kind}", *map(_wrapped, [*parts, *_definition(found)])]
    own = catalog.own_fields(kind)
    if own:
        parts.append(_table(own))
    labelled = _labelled(found)
    facts = [f"- Acts: {_acts(kind)}{_budget(found)}.", f"- Statistics: {_statistics(kind)}."]
    facts += [f"- {label}: {labelled[label]}" for label in _LABELS if label in labelled]
    return "\n\n".join([*parts, "\n".join(_wrapped(fact, "  ") for fact in facts)])


def _wrapped(text: str, indent: str = "") -> str:
    return textwrap.fill(text, 120, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def _title(kind: str) -> str:
    """Return the first line of the module's docstring without the name."""
    line = ast.get_docstring(ast.parse(catalog.source(kind).read_text(encoding="utf-8"))).splitlines()[0]
    return line[0].upper() + line[1:]


def _paragraphs(found: Class) -> list[str]:
    """Return the paragraphs, each as one line, with code in Markdown form."""
    joined = [" ".join(paragraph.split()) for paragraph in found.doc.split("\n\n")]
    return [re.sub(r"``(.+?)``", r"`\1`", paragraph) for paragraph in joined]


def _labelled(found: Class) -> dict[str, str]:
    labels = (paragraph.partition(": ") for paragraph in _paragraphs(found))
    return {label: text for label, _, text in labels if label in _LABELS}


def _definition(found: Class) -> list[str]:
    return [p for p in _paragraphs(found) if p.partition(": ")[0] not in _LABELS]


def _acts(kind: str) -> str:
    return "at each step" if catalog.acts_each_step(kind) else "never" if kind == "full" else "when compressing"


def _budget(found: Class) -> str:
    match found.variables.get("ignores_budget", False):
        case True:
            return "; runs once, for all budgets"
        case [name, value]:
            return f"; runs once, for all budgets, with `{name}: {value}`"
    return ""


def _statistics(kind: str) -> str:
    return ", ".join(f"`{name}`" for name in sorted(catalog.statistics(kind))) or "none"


def _row(name: str, field: Field) -> str:
    allowed = field.allowed
    words = re.sub(r"^(give|choose one of) ", "", allowed[1]) if allowed else field.types[1].partition(" like")[0]
    if allowed and field.default is None:
        words += " or null"
    default = field.default if isinstance(field.default, str) else json.dumps(field.default)
    return f"| `{name}` | `{default}` | {words} | {field.meaning} |"


if __name__ == "__main__":
    print(page(), end="")
