"""The native wire without I/O. The state machine itself is compiled: `dynwire._frames`, specified in docs/wire.md."""
