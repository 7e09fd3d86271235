"""The router: admission, tokenisation, placement, and both legs of a request."""
