"""What every request plane does, with one body for blocking and async callers."""
