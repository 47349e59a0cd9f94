"""A process that holds a model (or imports) and carries out jobs for those that would else load it themselves.

`client` hands a job over, `server` takes it, `frames` is what passes between them, `place` where they meet, `key` which
worker serves a job. A job needs none of it: without a worker it is carried out where it was started. Everything that a
client imports is of the standard library, since starting up is all that it costs.
"""
