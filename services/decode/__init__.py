"""The decode worker: receives KV caches and produces tokens."""
