"""Run a job in a warm worker, or else in this process, as `python -m MODULE ARGUMENTS` would.

python -m kv_transition.worker MODULE ARGUMENTS
"""

from __future__ import annotations

import sys

from kv_transition.errors import UserError
from kv_transition.worker import client, key


def main() -> None:
    """Run the job of the command line and return its exit status."""
    if len(sys.argv) < 2:
        sys.exit("name the module of a job and its arguments: python -m kv_transition.worker MODULE ARGUMENTS")
    module, *arguments = sys.argv[1:]
    try:
        status = client.carry_out({"module": module, "arguments": arguments}, key.of_arguments(module, arguments))
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    if status is not None:
        sys.exit(status)
    import runpy

    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
