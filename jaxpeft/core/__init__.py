"""Words that all packages use: errors, paths into trees, records, limits."""
