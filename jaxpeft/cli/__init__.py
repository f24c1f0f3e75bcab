"""What commands share: arguments, exit codes, signals, processes."""
