"""The load generator behind imds-benchmark: what is asked, the loop that asks, and its processes."""
