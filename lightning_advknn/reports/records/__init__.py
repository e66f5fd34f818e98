"""From per-sample rows to records, and from records to CSV files over seeds."""
