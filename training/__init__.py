"""How the checkpoint `checkpoints/pystdlib-7m` was made. Nothing that serves imports this package."""
