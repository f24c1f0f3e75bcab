"""What a run says: metrics, trackers, tables, progress."""
