"""What the prefill and the decode worker share: the front-to-rank channel and the step runner."""
