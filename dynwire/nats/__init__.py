"""NATS: what the nats plane, the event planes and discovery over NATS share."""
