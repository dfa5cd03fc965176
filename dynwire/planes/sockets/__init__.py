"""What the planes over sockets share: addresses, connection pools, the listening server. No plane of its own."""
