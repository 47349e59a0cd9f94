"""An OpenAI-compatible server over the local engine, whose requests name what is done to the cache."""
