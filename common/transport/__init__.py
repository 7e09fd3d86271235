"""Tagged messages of exact size between ranks; backends chosen by URL scheme."""
