"""The warm worker: a process that holds a model (or imported modules) and runs jobs that need it.

`client` sends a job, `server` receives it, `frames` is the protocol, `place` the folder of the sockets, and `key`
determines which worker serves a job. No job depends on a worker: without one it runs in its own process. The client
imports little of the standard library, and what only the first client or a job without a worker needs where it is used,
because its start-up time is its whole cost.
"""
