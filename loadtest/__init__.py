"""Load tests of a running server, from outside: arrivals, traces, targets, measurements and reports."""
