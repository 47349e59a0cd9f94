"""`python -m kv_transition`."""

from kv_transition.cli import app

app()
