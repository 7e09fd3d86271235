"""Scripts that check, then measure, in one call. Results live in docs/performance.md."""
