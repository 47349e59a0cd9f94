"""What Python code uses: a context read once, compressed, and asked; the names are exported by `kv_transition`."""
