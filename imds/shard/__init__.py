"""The shard: one process's part of the data, and its log. Knows no client."""
