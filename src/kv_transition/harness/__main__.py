"""The command line of lm-evaluation-harness with the additional model type ``kv_transition``.

    python -m kv_transition.harness run --model kv_transition \\
        --model_args pretrained=FOLDER,policy=snapkv,budget=0.2 --tasks TASK --output_path FOLDER
"""

from __future__ import annotations

import importlib.util
import sys


def main() -> int | None:
    if importlib.util.find_spec("lm_eval") is None:
        print("the harness is not installed; `make lm-eval` creates an environment with it", file=sys.stderr)
        return 1
    from lm_eval.__main__ import cli_evaluate

    from kv_transition.errors import UserError
    from kv_transition.harness import model  # noqa: F401  registers the model type

    try:
        return cli_evaluate()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
