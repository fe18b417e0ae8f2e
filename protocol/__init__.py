"""The rules of the swarm: pure and deterministic, no sockets, no clock, no torch."""
