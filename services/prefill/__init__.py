"""The prefill worker: computes KV caches and ships them."""
