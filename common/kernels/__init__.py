"""The operations a model step is made of; plain-torch references are the backend on CPU."""
