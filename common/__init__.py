"""What both ends of a wire must agree on, and what knows tensors but no requests."""
