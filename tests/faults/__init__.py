"""What breaks, on purpose: workers killed and stopped, connections cut, handlers that misbehave, foreign protocols."""
