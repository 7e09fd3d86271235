"""What strangers, clients and broken peers may send, from a seed; and what must hold meanwhile and afterwards."""
