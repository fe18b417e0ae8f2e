"""The application: trio, libp2p, the command line. The only floor that does I/O on the network."""
