"""The Python library: read a context once, compress it, and ask questions; `kv_transition` exports the names."""
