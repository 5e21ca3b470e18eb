"""The log on disk: a chain of synced frames in segments, snapshots, and what a start makes of them after any fault."""
