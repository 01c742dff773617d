"""The router: accepts clients, splits requests by shard, merges replies. Knows no data structure."""
