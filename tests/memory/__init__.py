"""What dynwire holds: memory, descriptors, threads, tasks. Real processes, numbers from /proc."""
