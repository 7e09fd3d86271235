"""Blocks, their hashes, the prefix cache, and the memory that holds them."""
