"""How much of its KV cache can a long-context language model lose before its answers become unreliable?"""

__version__ = "0.1.0"
