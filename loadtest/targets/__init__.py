"""The kinds of servers that a load test can be run against."""
