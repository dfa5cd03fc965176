"""NATS: the connection that the request plane, events and discovery share."""

from .connection import NatsConnection

__all__ = ["NatsConnection"]
